-- The whole schema of the embedded store. Times are microseconds since the Unix epoch, UTC.
-- AUTOINCREMENT is what keeps an id from being given out again after its row is deleted.

CREATE TABLE user (
    id                INTEGER PRIMARY KEY AUTOINCREMENT,
    username          TEXT    NOT NULL UNIQUE,
    email             TEXT    NOT NULL,
    password_hash     TEXT    NOT NULL,
    is_active         INTEGER NOT NULL CHECK (is_active IN (0, 1)),
    tokens_valid_from INTEGER NOT NULL,
    created_at        INTEGER NOT NULL
) STRICT;

CREATE TABLE session (
    token_hash BLOB    PRIMARY KEY CHECK (length(token_hash) = 32),
    user_id    INTEGER NOT NULL REFERENCES user (id),
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX session_by_user ON session (user_id);
CREATE INDEX session_by_expiry ON session (expires_at);

CREATE TABLE revoked_token (
    jti        TEXT    PRIMARY KEY,
    expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX revoked_token_by_expiry ON revoked_token (expires_at);

-- The long texts come last, so that reading a column before them never follows overflow pages.
CREATE TABLE prompt (
    id                INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id           INTEGER NOT NULL REFERENCES user (id),
    created_at        INTEGER NOT NULL,
    status            TEXT    NOT NULL CHECK (status IN ('running', 'completed', 'failed')),
    error             TEXT,
    llm_duration_ms   INTEGER,
    prompt_tokens     INTEGER,
    completion_tokens INTEGER,
    model             TEXT    NOT NULL,
    prompt            TEXT    NOT NULL,
    response          TEXT
) STRICT;

-- A user's history by id, and the parent key that prompt_embedding refers to.
CREATE UNIQUE INDEX prompt_by_user ON prompt (user_id, id);

-- A small number for each model's long name. Number 0 stands for "completed" in prompt_count.
CREATE TABLE embedding_model (
    id        INTEGER PRIMARY KEY AUTOINCREMENT,
    name      TEXT    NOT NULL UNIQUE,
    dimension INTEGER NOT NULL CHECK (dimension > 0)
) STRICT;

-- One vector for each completed prompt. Without a rowid the rows themselves lie in the order of the key,
-- so that all vectors of one user are read in one sweep.
CREATE TABLE prompt_embedding (
    user_id   INTEGER NOT NULL,
    prompt_id INTEGER NOT NULL,
    model_id  INTEGER NOT NULL REFERENCES embedding_model (id),
    f16       BLOB    NOT NULL,
    PRIMARY KEY (user_id, prompt_id),
    FOREIGN KEY (user_id, prompt_id) REFERENCES prompt (user_id, id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;

-- How many completed prompts (model_id 0) and how many vectors of each model a user has; user_id 0 is the sum over all users.
-- Kept by the triggers below, because counting a user's 100,000 rows on each search would cost more than the search.
CREATE TABLE prompt_count (
    user_id  INTEGER NOT NULL,
    model_id INTEGER NOT NULL,
    n        INTEGER NOT NULL CHECK (n >= 0),
    PRIMARY KEY (user_id, model_id)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER prompt_inserted AFTER INSERT ON prompt WHEN new.status = 'completed' BEGIN
    INSERT INTO prompt_count VALUES (new.user_id, 0, 1), (0, 0, 1) ON CONFLICT DO UPDATE SET n = n + 1;
END;

CREATE TRIGGER prompt_deleted AFTER DELETE ON prompt WHEN old.status = 'completed' BEGIN
    UPDATE prompt_count SET n = n - 1 WHERE user_id IN (old.user_id, 0) AND model_id = 0;
END;

CREATE TRIGGER prompt_embedding_inserted AFTER INSERT ON prompt_embedding BEGIN
    INSERT INTO prompt_count VALUES (new.user_id, new.model_id, 1), (0, new.model_id, 1)
        ON CONFLICT DO UPDATE SET n = n + 1;
END;

CREATE TRIGGER prompt_embedding_deleted AFTER DELETE ON prompt_embedding BEGIN
    UPDATE prompt_count SET n = n - 1 WHERE user_id IN (old.user_id, 0) AND model_id = old.model_id;
END;

CREATE TRIGGER prompt_embedding_changed_model AFTER UPDATE OF model_id ON prompt_embedding
WHEN new.model_id <> old.model_id BEGIN
    UPDATE prompt_count SET n = n - 1 WHERE user_id IN (old.user_id, 0) AND model_id = old.model_id;
    INSERT INTO prompt_count VALUES (new.user_id, new.model_id, 1), (0, new.model_id, 1)
        ON CONFLICT DO UPDATE SET n = n + 1;
END;
