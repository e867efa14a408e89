-- What calls used and cost, and budgets. Amounts are picodollars (1e-12 US dollars); days are counted from 1970-01-01 UTC. A call
-- belongs to the day on which it began.

-- The cost of the call that ended the prompt; NULL where no price is known.
ALTER TABLE prompt ADD COLUMN cost bigint;

-- A call is metered, and frees what it has reserved, although its prompt was deleted meanwhile. So its row no longer goes with the
-- prompt, and has what the row of usage needs. Ids of prompts are not given out again. A call that an earlier program has begun has
-- no user here, and is not metered.
ALTER TABLE running_call
    DROP CONSTRAINT running_call_prompt_id_fkey,
    ADD COLUMN user_id    bigint,
    ADD COLUMN api_key_id text   COLLATE "C",
    ADD COLUMN source     text   NOT NULL DEFAULT 'api',
    ADD COLUMN model      text   NOT NULL DEFAULT '',
    ADD COLUMN begun_at   bigint NOT NULL DEFAULT 0,
    ADD COLUMN reserved   bigint NOT NULL DEFAULT 0;

-- One row for each attempt at an upstream that may have cost something. Rows are added and never changed. The prompt may be
-- deleted, so prompt_id refers to nothing. Tokens are in kinds that do not overlap, NULL where they are not known.
CREATE TABLE usage (
    id            bigint  GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_id       bigint  NOT NULL REFERENCES account (id),
    api_key_id    text    COLLATE "C",
    prompt_id     bigint  NOT NULL,
    source        text    NOT NULL,
    begun_at      bigint  NOT NULL,
    day           bigint  NOT NULL,
    upstream      text    NOT NULL,
    model_asked   text    NOT NULL,
    model         text    COLLATE "C" NOT NULL,
    input         bigint,
    cache_read    bigint,
    cache_write   bigint,
    output        bigint,
    reasoning     bigint,
    cost          bigint,
    price_version text,
    outcome       text    NOT NULL CHECK (outcome IN ('answered', 'failed', 'cancelled', 'interrupted')),
    is_estimated  boolean NOT NULL
);

-- The sums of these rows. An absent key is ''.
CREATE TABLE usage_day (
    user_id     bigint NOT NULL REFERENCES account (id),
    day         bigint NOT NULL,
    api_key_id  text   COLLATE "C" NOT NULL,
    model       text   COLLATE "C" NOT NULL,
    attempts    bigint NOT NULL,
    input       bigint NOT NULL,
    cache_read  bigint NOT NULL,
    cache_write bigint NOT NULL,
    output      bigint NOT NULL,
    reasoning   bigint NOT NULL,
    cost        bigint NOT NULL,
    unpriced    bigint NOT NULL,
    PRIMARY KEY (user_id, day, api_key_id, model)
);

-- What budgets are checked against: of each subject ('service' of '', 'user' of an id, 'key' of an id), what its calls of a day
-- have cost, and what those that run have reserved. Day -1 is the sum of all days. The service is in it only if it has a budget.
CREATE TABLE spend (
    kind       text   COLLATE "C" NOT NULL CHECK (kind IN ('service', 'user', 'key')),
    subject_id text   COLLATE "C" NOT NULL,
    day        bigint NOT NULL,
    settled    bigint NOT NULL,
    reserved   bigint NOT NULL,
    PRIMARY KEY (kind, subject_id, day)
);

-- These rows change with every call that costs something: room in each page keeps the changes out of the index.
ALTER TABLE spend SET (fillfactor = 50);
ALTER TABLE usage_day SET (fillfactor = 70);

CREATE TABLE user_budget (
    user_id bigint PRIMARY KEY REFERENCES account (id),
    amount  bigint NOT NULL CHECK (amount > 0),
    period  text   NOT NULL CHECK (period IN ('day', 'week', 'month', 'total'))
);
