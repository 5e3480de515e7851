//! Runs one query in an SQLite without a database, whose tables are virtual.

use std::sync::Arc;

use gannet_proto::query::sql_response::{Columns, Message, Row, Rows, Value, value::Kind};
use rusqlite::{
    Connection, Error, ErrorCode, OpenFlags, Statement,
    config::DbConfig,
    ffi,
    hooks::{AuthAction, AuthContext, Authorization},
    limits::Limit,
    types::ValueRef,
};

use super::{SqlError, rows, scan::Scan};

/// Maximum size of a text, of a blob, and of a row that SQLite sorts, in bytes.
const MAX_VALUE_BYTES: i32 = 1 << 20;
/// Maximum size of one row of the answer, in bytes.
const MAX_ROW_BYTES: usize = 2 << 20;
/// Maximum size of all rows of the answer, in bytes.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// Minimum size of a message of rows, in bytes. The last message may be smaller.
const MESSAGE_BYTES: usize = 128 << 10;
/// Number of SQLite's steps between two checks of the time and the client.
const CHECK_STEPS: i32 = 2000;
/// Limits of one query. Each keeps a hostile text from work that SQLite does not interrupt.
const LIMITS: [(Limit, i32); 10] = [
    (Limit::SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES),
    (Limit::SQLITE_LIMIT_SQL_LENGTH, super::MAX_SQL_BYTES as i32),
    (Limit::SQLITE_LIMIT_COLUMN, 256),
    (Limit::SQLITE_LIMIT_EXPR_DEPTH, 200),
    (Limit::SQLITE_LIMIT_COMPOUND_SELECT, 50),
    (Limit::SQLITE_LIMIT_VDBE_OP, 100_000),
    (Limit::SQLITE_LIMIT_FUNCTION_ARG, 64),
    (Limit::SQLITE_LIMIT_ATTACHED, 0),
    // LIKE takes up to the product of both lengths.
    (Limit::SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 256),
    (Limit::SQLITE_LIMIT_WORKER_THREADS, 0),
];
/// Table functions of SQLite that need nothing but their arguments.
const TABLE_FUNCTIONS: [&str; 2] = ["json_each", "json_tree"];
/// Functions that reach outside of the query.
const DENIED_FUNCTIONS: [&str; 2] = ["load_extension", "fts3_tokenizer"];

/// Limits the memory of SQLite in this process. Only SQL queries use SQLite here.
pub(super) fn limit_heap(bytes: u64) {
    let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
    // SAFETY: the function takes a number, and SQLite allows the call from any thread at any time.
    unsafe { ffi::sqlite3_hard_heap_limit64(bytes) };
}

/// Runs a query and sends at most this number of rows. Reports whether there are more. Blocking.
pub(super) fn run(scan: &Arc<Scan>, sql: &str, max_rows: usize) -> Result<bool, SqlError> {
    let answered = open(scan).and_then(|connection| answer(&connection, scan, sql, max_rows));
    answered.map_err(|error| scan.take_fault().unwrap_or_else(|| explain(&error)))
}

fn open(scan: &Arc<Scan>) -> Result<Connection, Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_in_memory_with_flags(flags)?;
    // Sorts and intermediate results stay in the limit of memory, and reach no disk.
    connection.pragma_update(None, "temp_store", "MEMORY")?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    rows::register(&connection, scan)?;
    for (limit, value) in LIMITS {
        connection.set_limit(limit, value)?;
    }
    let of = Arc::clone(scan);
    connection.progress_handler(CHECK_STEPS, Some(move || of.must_stop()))?;
    let of = Arc::clone(scan);
    connection.authorizer(Some(move |context: AuthContext<'_>| authorize(&of, &context.action)))?;
    Ok(connection)
}

/// Allows reading of the tables, and nothing else.
fn authorize(scan: &Scan, action: &AuthAction<'_>) -> Authorization {
    let denied = match action {
        // A table of which no column is read may be a common table expression.
        AuthAction::Select | AuthAction::Recursive | AuthAction::Read { column_name: "", .. } => {
            return Authorization::Allow;
        }
        AuthAction::Read { table_name, .. } => {
            let names = || scan.tables.iter().map(crate::table::TableSnapshot::name);
            if names().chain(TABLE_FUNCTIONS).any(|name| name == *table_name) {
                return Authorization::Allow;
            }
            let names: Vec<_> = names().collect();
            format!("`{table_name}` cannot be read; the tables are {}", names.join(", "))
        }
        AuthAction::Function { function_name } if !DENIED_FUNCTIONS.contains(function_name) => {
            return Authorization::Allow;
        }
        AuthAction::Function { function_name } => format!("the function `{function_name}` cannot be used"),
        _ => "the tables can only be read: give one SELECT".to_owned(),
    };
    scan.fail(SqlError::Invalid(denied));
    Authorization::Deny
}

fn answer(connection: &Connection, scan: &Scan, sql: &str, max_rows: usize) -> Result<bool, Error> {
    let mut statement = connection.prepare(sql)?;
    if statement.column_count() == 0 || !statement.readonly() {
        return Err(scan.fail(SqlError::Invalid("the tables can only be read: give one SELECT".to_owned())));
    }
    let names = statement.column_names().into_iter().map(ToOwned::to_owned).collect();
    let send = |message| scan.send(message).map_err(|error| scan.fail(error));
    send(Message::Columns(Columns { names }))?;
    send_rows(&mut statement, scan, max_rows, send)
}

fn send_rows(
    statement: &mut Statement<'_>,
    scan: &Scan,
    max_rows: usize,
    send: impl Fn(Message) -> Result<(), Error>,
) -> Result<bool, Error> {
    let columns = statement.column_count();
    let mut found = statement.query([])?;
    let (mut waiting, mut waiting_bytes, mut count, mut bytes) = (Vec::new(), 0, 0, 0);
    let mut has_more = false;
    while let Some(row) = found.next()? {
        if count == max_rows {
            has_more = true;
            break;
        }
        let mut size = 0;
        let mut values = Vec::with_capacity(columns);
        for column in 0..columns {
            let value = row.get_ref(column)?;
            size += 16 + value.as_bytes_or_null().ok().flatten().map_or(0, <[u8]>::len);
            if size > MAX_ROW_BYTES {
                return Err(scan.fail(SqlError::Limit(
                    "a row is larger than 2 MiB; select fewer or shorter columns".to_owned(),
                )));
            }
            values.push(Value { kind: kind(value) });
        }
        count += 1;
        bytes += size;
        waiting_bytes += size;
        waiting.push(Row { values });
        if bytes > MAX_ANSWER_BYTES {
            return Err(scan.fail(SqlError::Limit(
                "the answer is larger than 64 MiB; select fewer rows or columns, or group them".to_owned(),
            )));
        }
        if waiting_bytes >= MESSAGE_BYTES {
            send(Message::Rows(Rows { rows: std::mem::take(&mut waiting) }))?;
            waiting_bytes = 0;
        }
    }
    if !waiting.is_empty() {
        send(Message::Rows(Rows { rows: waiting }))?;
    }
    Ok(has_more)
}

fn kind(value: ValueRef<'_>) -> Option<Kind> {
    Some(match value {
        ValueRef::Null => return None,
        ValueRef::Integer(value) => Kind::Integer(value),
        ValueRef::Real(value) => Kind::Real(value),
        ValueRef::Text(text) => Kind::Text(String::from_utf8_lossy(text).into_owned()),
        ValueRef::Blob(bytes) => Kind::Blob(bytes.to_vec()),
    })
}

/// Explains an error of SQLite.
fn explain(error: &Error) -> SqlError {
    let text = match error {
        Error::SqliteFailure(failure, text) => match failure.code {
            ErrorCode::OutOfMemory => {
                return SqlError::Limit(
                    "the query needs more memory for sorting and grouping than half of --sql-memory-bytes; select less, or raise it"
                        .to_owned(),
                );
            }
            ErrorCode::TooBig => {
                return SqlError::Limit(
                    "a text, a blob or the query is larger than 1 MiB, or the query is too complex; select less of it".to_owned(),
                );
            }
            _ => text.clone().unwrap_or_else(|| failure.to_string()),
        },
        Error::SqlInputError { msg, offset, .. } if *offset >= 0 => {
            format!("{msg}, at character {}", offset + 1)
        }
        Error::SqlInputError { msg, .. } => msg.clone(),
        Error::MultipleStatement => "give one SELECT, without another statement behind it".to_owned(),
        Error::InvalidParameterCount(..) => "the query has parameters; write their values".to_owned(),
        other => other.to_string(),
    };
    SqlError::Invalid(text)
}
