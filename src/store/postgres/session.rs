//! The settings of the service's sessions and transactions.

/// The settings of each session. A statement whose caller no longer waits ends by itself, a little
/// after [`PATIENCE`](super::pool::PATIENCE) or as soon as the server finds the connection closed.
/// So the server works on little more than the pool has room for. To compile a statement costs more
/// than the statements here take. An acknowledged write is on disk. Some systems that the server
/// may run on cannot watch connections; there that setting is refused.
///
/// A role may have its own limits on a session's and a transaction's time, for the people who use
/// it. A connection that idles in the pool, and a long read, are correct here.
///
/// The types and operators of pgvector may be in a schema that the role's search path does not
/// name, for example if an administrator puts all extensions into one. That schema comes last in
/// the path, and never alone: tables are created in the first schema of the path.
pub(super) const SESSION: &str = "
    SET client_min_messages = warning;
    SET statement_timeout = '5s';
    SET lock_timeout = '10s';
    SET idle_in_transaction_session_timeout = '60s';
    SET jit = off;
    SELECT set_config(name, '0', false) FROM pg_settings WHERE name IN ('transaction_timeout', 'idle_session_timeout');
    SELECT set_config('search_path', concat_ws(', ', nullif(current_setting('search_path'), ''), quote_ident(nspname)), false)
    FROM pg_extension JOIN pg_namespace ON pg_namespace.oid = extnamespace
    WHERE extname = 'vector' AND nspname <> ALL (current_schemas(true)) AND current_schema() IS NOT NULL;
    SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off';
    DO $$ BEGIN
        SET client_connection_check_interval = '1s';
    EXCEPTION WHEN OTHERS THEN NULL;
    END $$";

/// Lifts every limit on the time of the transaction that has begun, whatever the role's are.
/// Servers before PostgreSQL 17 do not know the first.
pub(in crate::store) const NO_TIMEOUTS: &str = "
    SELECT set_config(name, '0', true) FROM pg_settings
    WHERE name IN ('transaction_timeout', 'statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout',
                   'idle_session_timeout')";

/// Begins the transaction of a call of [`LONG_PATIENCE`](super::pool::LONG_PATIENCE), whose
/// statements may take longer than those of requests.
pub(super) const BEGIN_LONG: &str = "BEGIN; SET LOCAL statement_timeout = '60s'";
