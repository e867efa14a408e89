-- The same names as in PostgreSQL's schema. Indexes, triggers and references follow the renamed ones.
ALTER TABLE user RENAME TO account;
ALTER TABLE prompt_embedding RENAME COLUMN f16 TO embedding;
