-- API keys. A revoked key keeps its row: usage is counted by the ids of keys.
CREATE TABLE api_key (
    id             TEXT    PRIMARY KEY CHECK (length(id) = 8),
    user_id        INTEGER NOT NULL REFERENCES account (id),
    name           TEXT    NOT NULL,
    key_hash       BLOB    NOT NULL CHECK (length(key_hash) = 32),
    previous_hash  BLOB    CHECK (length(previous_hash) = 32),
    previous_until INTEGER,
    last_four      TEXT    NOT NULL,
    scopes         TEXT    NOT NULL,
    models         TEXT    NOT NULL,
    rates          TEXT,
    budget         INTEGER CHECK (budget > 0),
    budget_period  TEXT    CHECK (budget_period IN ('day', 'week', 'month', 'total')),
    expires_at     INTEGER,
    created_at     INTEGER NOT NULL,
    revoked_at     INTEGER,
    last_used_at   INTEGER,
    CHECK ((previous_hash IS NULL) = (previous_until IS NULL)),
    CHECK ((budget IS NULL) = (budget_period IS NULL))
) STRICT, WITHOUT ROWID;

CREATE INDEX api_key_by_user ON api_key (user_id, created_at) WHERE revoked_at IS NULL;
