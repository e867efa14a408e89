-- Calls of /v1/chat/completions: what is kept of them beside the texts of their prompts.

-- The front door by which a prompt came.
ALTER TABLE prompt ADD COLUMN source TEXT NOT NULL DEFAULT 'api' CHECK (source IN ('api', 'page', 'v1'));

-- Whether the prompt stays when the call has ended. Until then no list shows one that does not stay.
ALTER TABLE running_call ADD COLUMN is_kept INTEGER NOT NULL DEFAULT 1 CHECK (is_kept IN (0, 1));

-- JSON, as it came but for media: an array, an object, an object of strings, an object.
CREATE TABLE chat_call (
    prompt_id INTEGER PRIMARY KEY REFERENCES prompt (id) ON DELETE CASCADE,
    user_id   INTEGER NOT NULL,
    metadata  TEXT    NOT NULL,
    messages  TEXT    NOT NULL,
    request   TEXT    NOT NULL,
    answer    TEXT
) STRICT;

CREATE INDEX chat_call_by_user ON chat_call (user_id, prompt_id);
