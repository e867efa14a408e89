-- What calls used and cost, and budgets. Amounts are picodollars (1e-12 US dollars); days are counted from 1970-01-01 UTC. A call
-- belongs to the day on which it began.

-- The cost of the call that ended the prompt; NULL where no price is known.
ALTER TABLE prompt ADD COLUMN cost INTEGER;

-- A call is metered, and frees what it has reserved, although its prompt was deleted meanwhile. So its row no longer goes with the
-- prompt, and has what the row of usage needs. Ids of prompts are not given out again.
CREATE TABLE running_call_2 (
    prompt_id   INTEGER PRIMARY KEY,
    replica     BLOB    NOT NULL CHECK (length(replica) = 16),
    call        INTEGER NOT NULL,
    lease_until INTEGER NOT NULL,
    announce    INTEGER NOT NULL CHECK (announce IN (0, 1)),
    is_kept     INTEGER NOT NULL DEFAULT 1 CHECK (is_kept IN (0, 1)),
    user_id     INTEGER,
    api_key_id  TEXT,
    source      TEXT    NOT NULL DEFAULT 'api',
    model       TEXT    NOT NULL DEFAULT '',
    begun_at    INTEGER NOT NULL DEFAULT 0,
    reserved    INTEGER NOT NULL DEFAULT 0
) STRICT;

INSERT INTO running_call_2 (prompt_id, replica, call, lease_until, announce, is_kept, user_id, source, model, begun_at)
    SELECT r.prompt_id, r.replica, r.call, r.lease_until, r.announce, r.is_kept, p.user_id, p.source, p.model, p.created_at
    FROM running_call r JOIN prompt p ON p.id = r.prompt_id;

DROP TABLE running_call;
ALTER TABLE running_call_2 RENAME TO running_call;
CREATE INDEX running_call_by_lease ON running_call (lease_until);

-- One row for each attempt at an upstream that may have cost something. Rows are added and never changed. The prompt may be
-- deleted, so prompt_id refers to nothing. Tokens are in kinds that do not overlap, NULL where they are not known.
CREATE TABLE usage (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id       INTEGER NOT NULL REFERENCES account (id),
    api_key_id    TEXT,
    prompt_id     INTEGER NOT NULL,
    source        TEXT    NOT NULL,
    begun_at      INTEGER NOT NULL,
    day           INTEGER NOT NULL,
    upstream      TEXT    NOT NULL,
    model_asked   TEXT    NOT NULL,
    model         TEXT    NOT NULL,
    input         INTEGER,
    cache_read    INTEGER,
    cache_write   INTEGER,
    output        INTEGER,
    reasoning     INTEGER,
    cost          INTEGER,
    price_version TEXT,
    outcome       TEXT    NOT NULL CHECK (outcome IN ('answered', 'failed', 'cancelled', 'interrupted')),
    is_estimated  INTEGER NOT NULL CHECK (is_estimated IN (0, 1))
) STRICT;

-- The sums of these rows. An absent key is ''.
CREATE TABLE usage_day (
    user_id     INTEGER NOT NULL REFERENCES account (id),
    day         INTEGER NOT NULL,
    api_key_id  TEXT    NOT NULL,
    model       TEXT    NOT NULL,
    attempts    INTEGER NOT NULL,
    input       INTEGER NOT NULL,
    cache_read  INTEGER NOT NULL,
    cache_write INTEGER NOT NULL,
    output      INTEGER NOT NULL,
    reasoning   INTEGER NOT NULL,
    cost        INTEGER NOT NULL,
    unpriced    INTEGER NOT NULL,
    PRIMARY KEY (user_id, day, api_key_id, model)
) STRICT, WITHOUT ROWID;

-- What budgets are checked against: of each subject ('service' of '', 'user' of an id, 'key' of an id), what its calls of a day
-- have cost, and what those that run have reserved. Day -1 is the sum of all days. The service is in it only if it has a budget.
CREATE TABLE spend (
    kind       TEXT    NOT NULL CHECK (kind IN ('service', 'user', 'key')),
    subject_id TEXT    NOT NULL,
    day        INTEGER NOT NULL,
    settled    INTEGER NOT NULL,
    reserved   INTEGER NOT NULL,
    PRIMARY KEY (kind, subject_id, day)
) STRICT, WITHOUT ROWID;

CREATE TABLE user_budget (
    user_id INTEGER PRIMARY KEY REFERENCES account (id),
    amount  INTEGER NOT NULL CHECK (amount > 0),
    period  TEXT    NOT NULL CHECK (period IN ('day', 'week', 'month', 'total'))
) STRICT;
