-- Prompts that are stored before their answer is there, idempotency keys, and the calls of each day.

-- Why the answer ended where it did, in the upstream's word.
ALTER TABLE prompt ADD COLUMN finish_reason text;

-- One row for each prompt with status 'running': who works on it, and until when that counts without a renewal, in microseconds
-- since the Unix epoch by this server's clock. Apart from the prompt, so that renewing leases rewrites no texts.
CREATE TABLE running_call (
    prompt_id   bigint  PRIMARY KEY REFERENCES prompt (id) ON DELETE CASCADE,
    replica     bytea   NOT NULL CHECK (octet_length(replica) = 16),
    call        bigint  NOT NULL,
    lease_until bigint  NOT NULL,
    announce    boolean NOT NULL
);

CREATE INDEX running_call_by_lease ON running_call (lease_until);

-- The prompt may be deleted while its key is kept, so prompt_id refers to nothing; ids are not given out again.
CREATE TABLE idempotency_key (
    user_id     bigint NOT NULL REFERENCES account (id),
    key_hash    bytea  NOT NULL CHECK (octet_length(key_hash) = 32),
    fingerprint bytea  NOT NULL CHECK (octet_length(fingerprint) = 32),
    prompt_id   bigint NOT NULL,
    claimed_at  bigint NOT NULL,
    PRIMARY KEY (user_id, key_hash)
);

CREATE INDEX idempotency_key_by_prompt ON idempotency_key (prompt_id);
CREATE INDEX idempotency_key_by_claim ON idempotency_key (claimed_at);

-- Calls counted against the daily limit; day is in days since 1970-01-01 UTC.
CREATE TABLE upstream_day (
    day   bigint PRIMARY KEY,
    calls bigint NOT NULL
);
