-- Up to where what has expired is forgotten. One row at most: see docs/decisions/0016.
CREATE TABLE purge_horizon (
    id      integer PRIMARY KEY CHECK (id = 1),
    reached bigint  NOT NULL
);
