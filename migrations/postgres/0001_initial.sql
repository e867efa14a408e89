-- The whole schema of the scale-out store. Times are microseconds since the Unix epoch, UTC, as in the embedded store.
-- Names and keys are compared byte by byte: collation "C".

CREATE TABLE account (
    id                bigint  GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    username          text    COLLATE "C" NOT NULL UNIQUE,
    email             text    NOT NULL,
    password_hash     text    NOT NULL,
    is_active         boolean NOT NULL,
    tokens_valid_from bigint  NOT NULL,
    created_at        bigint  NOT NULL
);

CREATE TABLE session (
    token_hash bytea  PRIMARY KEY CHECK (octet_length(token_hash) = 32),
    user_id    bigint NOT NULL REFERENCES account (id),
    created_at bigint NOT NULL,
    expires_at bigint NOT NULL
);

CREATE INDEX session_by_user ON session (user_id);
CREATE INDEX session_by_expiry ON session (expires_at);

-- A token's id is any text, which may hold a NUL, which the type text may not.
CREATE TABLE revoked_token (
    jti        bytea  PRIMARY KEY,
    expires_at bigint NOT NULL
);

CREATE INDEX revoked_token_by_expiry ON revoked_token (expires_at);

-- An identity's numbers are never given out twice, not even after a rollback or a crash.
CREATE TABLE prompt (
    id                bigint  GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_id           bigint  NOT NULL REFERENCES account (id),
    created_at        bigint  NOT NULL,
    status            text    NOT NULL CHECK (status IN ('running', 'completed', 'failed')),
    error             text,
    llm_duration_ms   bigint,
    prompt_tokens     bigint,
    completion_tokens bigint,
    model             text    NOT NULL,
    prompt            text    NOT NULL,
    response          text
);

-- A user's history by id. With the status in it, completed prompts are counted without a look at the rows.
CREATE UNIQUE INDEX prompt_by_user ON prompt (user_id, id) INCLUDE (status);

-- A small number for each model's long name.
CREATE TABLE embedding_model (
    id        integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name      text    COLLATE "C" NOT NULL UNIQUE,
    dimension integer NOT NULL CHECK (dimension > 0)
);

-- One vector for each completed prompt, of unit length, in a table of its own: what happens to a prompt's texts leaves no dead
-- vectors behind. The number of dimensions is set by the first server that starts with a model.
CREATE TABLE prompt_embedding (
    prompt_id bigint  NOT NULL REFERENCES prompt (id) ON DELETE CASCADE,
    user_id   bigint  NOT NULL,
    model_id  integer NOT NULL REFERENCES embedding_model (id),
    embedding halfvec NOT NULL,
    PRIMARY KEY (prompt_id) INCLUDE (model_id)
);

ALTER TABLE prompt_embedding ALTER COLUMN embedding SET STORAGE PLAIN;

-- Everything that a search among one user's prompts reads, in the order in which it reads it. Only while a page's rows are known
-- to be visible to all (the visibility map, which vacuum keeps) is the table itself left alone, so vacuum has to come often.
CREATE INDEX prompt_embedding_by_owner ON prompt_embedding (model_id, user_id, prompt_id) INCLUDE (embedding);

ALTER TABLE prompt_embedding SET (
    autovacuum_vacuum_insert_threshold = 1000,
    autovacuum_vacuum_insert_scale_factor = 0.02,
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_analyze_scale_factor = 0.02
);
