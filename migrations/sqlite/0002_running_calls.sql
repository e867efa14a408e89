-- Prompts that are stored before their answer is there, idempotency keys, and the calls of each day.

-- Why the answer ended where it did, in the upstream's word.
ALTER TABLE prompt ADD COLUMN finish_reason TEXT;

-- One row for each prompt with status 'running': who works on it, and until when that counts without a renewal.
-- Apart from the prompt, so that renewing leases writes a few small pages however long the texts are.
CREATE TABLE running_call (
    prompt_id   INTEGER PRIMARY KEY REFERENCES prompt (id) ON DELETE CASCADE,
    replica     BLOB    NOT NULL CHECK (length(replica) = 16),
    call        INTEGER NOT NULL,
    lease_until INTEGER NOT NULL,
    announce    INTEGER NOT NULL CHECK (announce IN (0, 1))
) STRICT;

CREATE INDEX running_call_by_lease ON running_call (lease_until);

-- The prompt may be deleted while its key is kept, so prompt_id refers to nothing; ids are not given out again.
CREATE TABLE idempotency_key (
    user_id     INTEGER NOT NULL REFERENCES user (id),
    key_hash    BLOB    NOT NULL CHECK (length(key_hash) = 32),
    fingerprint BLOB    NOT NULL CHECK (length(fingerprint) = 32),
    prompt_id   INTEGER NOT NULL,
    claimed_at  INTEGER NOT NULL,
    PRIMARY KEY (user_id, key_hash)
) STRICT, WITHOUT ROWID;

CREATE INDEX idempotency_key_by_prompt ON idempotency_key (prompt_id);
CREATE INDEX idempotency_key_by_claim ON idempotency_key (claimed_at);

-- Calls counted against the daily limit; day is in days since 1970-01-01 UTC.
CREATE TABLE upstream_day (
    day   INTEGER PRIMARY KEY,
    calls INTEGER NOT NULL
) STRICT;

CREATE TRIGGER prompt_became_completed AFTER UPDATE OF status ON prompt
WHEN new.status = 'completed' AND old.status <> 'completed' BEGIN
    INSERT INTO prompt_count VALUES (new.user_id, 0, 1), (0, 0, 1) ON CONFLICT DO UPDATE SET n = n + 1;
END;
