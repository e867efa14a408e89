-- API keys. A revoked key keeps its row: usage is counted by the ids of keys.
CREATE TABLE api_key (
    id             text   COLLATE "C" PRIMARY KEY CHECK (length(id) = 8),
    user_id        bigint NOT NULL REFERENCES account (id),
    name           text   NOT NULL,
    key_hash       bytea  NOT NULL CHECK (octet_length(key_hash) = 32),
    previous_hash  bytea  CHECK (octet_length(previous_hash) = 32),
    previous_until bigint,
    last_four      text   NOT NULL,
    scopes         text   NOT NULL,
    models         text   NOT NULL,
    rates          text,
    budget         bigint CHECK (budget > 0),
    budget_period  text   CHECK (budget_period IN ('day', 'week', 'month', 'total')),
    expires_at     bigint,
    created_at     bigint NOT NULL,
    revoked_at     bigint,
    last_used_at   bigint,
    CHECK ((previous_hash IS NULL) = (previous_until IS NULL)),
    CHECK ((budget IS NULL) = (budget_period IS NULL))
);

CREATE INDEX api_key_by_user ON api_key (user_id, created_at) WHERE revoked_at IS NULL;
