-- Calls of /v1/chat/completions: what is kept of them beside the texts of their prompts.

-- The front door by which a prompt came.
ALTER TABLE prompt ADD COLUMN source text NOT NULL DEFAULT 'api' CHECK (source IN ('api', 'page', 'v1'));

-- Whether the prompt stays when the call has ended. Until then no list shows one that does not stay.
ALTER TABLE running_call ADD COLUMN is_kept boolean NOT NULL DEFAULT true;

-- JSON, as it came but for media: an array, an object, an object of strings, an object. Not jsonb, which has no place for NUL in
-- strings and changes the spelling of numbers.
CREATE TABLE chat_call (
    prompt_id bigint PRIMARY KEY REFERENCES prompt (id) ON DELETE CASCADE,
    user_id   bigint NOT NULL,
    metadata  text   NOT NULL,
    messages  text   NOT NULL,
    request   text   NOT NULL,
    answer    text
);

CREATE INDEX chat_call_by_user ON chat_call (user_id, prompt_id);
