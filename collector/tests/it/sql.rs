//! SQL queries over the table: their sums, and what a hostile query can do.

use std::{path::Path, time::Duration};

use gannet_base::{ByteSize, TimeSpan};
use gannet_collector::{Collector, Config, Running};
use gannet_proto::query::{
    SqlRequest,
    sql_response::{End, Message, Row, value::Kind},
};
use rstest::rstest;
use tonic::{Code, Status};

use crate::{
    bucket::{S3, in_bucket},
    support::{Pusher, TEST_TIMEOUT, batch, config_with, eventually, now_ms, queries, start},
    table::{Sums, batches, sent_sums, up_to_date, with_table},
};

async fn start_with(dir: &Path, change: impl FnOnce(&mut Config)) -> Running {
    let config = config_with(dir, |config| {
        with_table(config);
        change(config);
    });
    Collector::start(config).await.unwrap()
}

/// The answer of a query: columns, rows, and the end.
pub type Answer = (Vec<String>, Vec<Row>, End);

pub async fn ask(running: &Running, sql: &str) -> Result<Answer, Status> {
    ask_for(running, sql, 0).await
}

async fn ask_for(running: &Running, sql: &str, max_rows: u32) -> Result<Answer, Status> {
    answer(running, SqlRequest { sql: sql.to_owned(), max_rows, timeout: None }).await
}

async fn ask_within(running: &Running, sql: &str, ms: u64) -> Result<Answer, Status> {
    let timeout = prost_types::Duration::try_from(Duration::from_millis(ms)).unwrap();
    answer(running, SqlRequest { sql: sql.to_owned(), max_rows: 0, timeout: Some(timeout) }).await
}

async fn answer(running: &Running, request: SqlRequest) -> Result<Answer, Status> {
    let mut messages = queries(running).await.sql(request).await?.into_inner();
    let (mut columns, mut rows) = (Vec::new(), Vec::new());
    while let Some(response) = messages.message().await? {
        match response.message.unwrap() {
            Message::Columns(found) => columns = found.names,
            Message::Rows(found) => rows.extend(found.rows),
            Message::Progress(_) => {}
            Message::End(end) => return Ok((columns, rows, end)),
        }
    }
    panic!("the answer has no end");
}

fn text(row: &Row, column: usize) -> String {
    match &row.values[column].kind {
        Some(Kind::Text(text)) => text.clone(),
        other => panic!("column {column} is {other:?}"),
    }
}

fn number(row: &Row, column: usize) -> i64 {
    match row.values[column].kind {
        Some(Kind::Integer(number)) => number,
        ref other => panic!("column {column} is {other:?}"),
    }
}

pub async fn numbers(running: &Running, sql: &str) -> Vec<i64> {
    let (_, rows, _) = ask(running, sql).await.unwrap_or_else(|status| panic!("{sql}: {status}"));
    rows.iter().flat_map(|row| (0..row.values.len()).map(|column| number(row, column))).collect()
}

/// Checks all tables and their joins against the profiles that were sent, after merges and between them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sql_sums_stacks_like_the_profiles_that_were_sent() {
    let dir = tempfile::tempdir().unwrap();
    let running = start_with(dir.path(), |config| config.table.merge_files = 3).await;
    let mut sent = Vec::new();
    for round in 0..5 {
        let new = batches(round, 9);
        Pusher::open(running.grpc_addr).await.store_all(&new).await;
        sent.extend(new);
        up_to_date(running.http_addr).await;
    }
    let sql = "WITH names AS (
            SELECT k.date, k.hour, k.stack_id, group_concat(f.function, ';' ORDER BY e.key) AS stack
            FROM stacks k JOIN json_each(k.frames) e JOIN frames f
            ON f.date = k.date AND f.hour = k.hour AND f.frame_id = e.value GROUP BY 1, 2, 3
        )
        SELECT profile_id, stack, sum(value), sum(count) FROM samples JOIN names USING (date, hour, stack_id)
        WHERE type = 'cpu/nanoseconds' GROUP BY 1, 2";
    let (columns, rows, end) = ask(&running, sql).await.unwrap();
    assert_eq!(columns, ["profile_id", "stack", "sum(value)", "sum(count)"]);
    assert!(!end.more && end.progress.unwrap().bytes_read > 1000, "{end:?}");
    let found: Sums =
        rows.iter().map(|row| ((text(row, 0), text(row, 1)), (number(row, 2), number(row, 3)))).collect();
    assert_eq!(found, sent_sums(&sent));

    // The other direction, by keys of all kinds, and NULL.
    let id = &sent[7].batch_id;
    let of_one = sent_sums([&sent[7]]);
    let value: i64 = of_one.values().map(|(value, _)| value).sum();
    let by_profile = format!(
        "SELECT sum(s.value) FROM profiles p JOIN samples s USING (profile_id) WHERE p.profile_id = '{id}'"
    );
    assert_eq!(numbers(&running, &by_profile).await, [value]);
    for (sql, wanted) in [
        ("SELECT (SELECT sum(value) FROM samples) - (SELECT sum(value) FROM samples_by_minute)", 0),
        (
            "SELECT count(*) FROM samples_by_hour h JOIN stacks USING (date, hour, stack_id) WHERE pod = 'p2' AND value < 1",
            0,
        ),
        ("SELECT count(*) FROM profiles WHERE profile_id = NULL", 0),
        ("SELECT count(*) FROM profiles WHERE labels ->> 'node' = 'n1'", sent.len() as i64),
        ("SELECT count(*) FROM samples JOIN profiles USING (date, hour, profile_id)", found.len() as i64),
        ("SELECT count(*) FROM samples s JOIN labels l USING (labels_id)", 0),
        ("SELECT count(*) FROM samples WHERE service_name = 's1' AND service_name > 's1'", 0),
        ("SELECT count(*) FROM profiles WHERE service_name COLLATE NOCASE = 'S1'", 15),
        ("SELECT count(*) FROM profiles WHERE service_name IN ('s0', 's2', 'x')", 30),
        ("SELECT count(*) FROM profiles WHERE service_name = 's1' OR time < '2000-01-01'", 15),
        ("SELECT count(*) FROM profiles WHERE hour > 23 OR hour < '0'", 0),
        ("SELECT count(*) FROM stacks WHERE stack_id = (SELECT CAST(max(stack_id) AS TEXT) FROM stacks)", 1),
        ("SELECT count(*) FROM frames WHERE frame_id = (SELECT min(frame_id) + 0.0 FROM frames)", 1),
        ("SELECT count(*) FROM profiles WHERE time >= datetime('now', '-45 minutes')", 25),
    ] {
        assert_eq!(numbers(&running, sql).await, [wanted], "{sql}");
    }
    running.shutdown().await;
}

/// Checks that a query reads only the hours, services and columns that it needs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_query_reads_what_its_conditions_leave() {
    let dir = tempfile::tempdir().unwrap();
    let running = start_with(dir.path(), |_| {}).await;
    let hour = 3_600_000;
    let sent: Vec<_> = (0..6)
        .map(|hours| batch(&format!("s{hours}"), now_ms() - hours * hour, &[("main;work", 1)]))
        .collect();
    for batch in &sent {
        Pusher::open(running.grpc_addr).await.store_all(std::slice::from_ref(batch)).await;
        up_to_date(running.http_addr).await;
    }
    let read = async |sql: &str| {
        let (_, _, End { progress, .. }) = ask(&running, sql).await.unwrap();
        let progress = progress.unwrap();
        (progress.row_groups_read, progress.bytes_read)
    };
    let (all, all_bytes) = read("SELECT * FROM samples").await;
    assert_eq!(all, 6);
    let (_, one_column) = read("SELECT sum(value) FROM samples").await;
    assert!(one_column < all_bytes, "{one_column} of {all_bytes} bytes");
    for sql in [
        "SELECT sum(value) FROM samples WHERE service_name = 's4'",
        "SELECT sum(value) FROM samples WHERE time >= datetime('now', '-30 minutes')",
        "SELECT sum(value) FROM samples WHERE (date, hour) = (SELECT date, hour FROM profiles WHERE service_name = 's3')",
    ] {
        let (groups, _) = read(sql).await;
        let most = if sql.contains("profiles") { 2 } else { 1 };
        assert_eq!(groups, most, "{sql}");
    }
    running.shutdown().await;
}

#[rstest]
#[case::write("INSERT INTO samples(value) VALUES (1)", "only be read")]
#[case::create("CREATE TABLE x(y)", "only be read")]
#[case::attach("ATTACH '/etc/passwd' AS x", "only be read")]
#[case::pragma("PRAGMA hard_heap_limit = 0", "only be read")]
#[case::pragma_table("SELECT * FROM pragma_database_list", "the tables are samples, ")]
#[case::schema("SELECT * FROM sqlite_schema", "`sqlite_master` cannot be read")]
#[case::vacuum("VACUUM INTO '/tmp/x'", "only be read")]
#[case::extension("SELECT load_extension('x')", "`load_extension` cannot be used")]
#[case::two("SELECT 1; SELECT 2", "without another statement")]
#[case::nothing("-- nothing", "give one SELECT")]
#[case::empty("  ", "give one SELECT")]
#[case::parameter("SELECT ?", "parameters")]
#[case::wrong("SELEC 1", "near \"SELEC\": syntax error")]
#[case::table("SELECT * FROM sample", "no such table: sample")]
#[case::column("SELECT services FROM samples", "no such column: services")]
#[case::day(
    "SELECT 1 FROM samples WHERE date = '31.01.2026'",
    "date: compare it with a text like '2026-01-31'"
)]
#[case::time(
    "SELECT 1 FROM samples WHERE time > '2026-01-31T12:00:00Z'",
    "time: compare it with a text like"
)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sql_that_does_not_only_read_is_refused(#[case] sql: &str, #[case] says: &str) {
    let dir = tempfile::tempdir().unwrap();
    let running = start_with(dir.path(), |_| {}).await;
    let status = ask(&running, sql).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert!(status.message().contains(says), "{}", status.message());
    running.shutdown().await;
}

/// Checks that each of these ends by itself, with an error that names the limit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_query_ends_at_its_limits() {
    let dir = tempfile::tempdir().unwrap();
    let running = start_with(dir.path(), |config| {
        config.sql.sql_timeout = TimeSpan::from_secs(600);
        config.sql.sql_memory_bytes = ByteSize(32 << 20);
    })
    .await;
    Pusher::open(running.grpc_addr).await.store_all(&batches(0, 9)).await;
    up_to_date(running.http_addr).await;
    let endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)";
    let cross = (0..12).map(|n| format!("samples s{n}")).collect::<Vec<_>>().join(", ");
    let (text, long) = ("printf('%.*c', 1000000, 'a')", "printf('%.*c', 10000, 'a')");
    for (sql, says) in [
        (format!("{endless} SELECT i, {long} FROM n ORDER BY i"), "--sql-memory-bytes"),
        (format!("{endless} SELECT count(DISTINCT i || {long}) FROM n"), "--sql-memory-bytes"),
        (
            format!("SELECT count(*) FROM (SELECT DISTINCT i || {long} FROM ({endless} SELECT i FROM n))"),
            "--sql-memory-bytes",
        ),
        ("SELECT length(randomblob(1000000000))".to_owned(), "larger than 1 MiB"),
        ("SELECT length(zeroblob(2000000000))".to_owned(), "larger than 1 MiB"),
        ("SELECT hex(printf('%.*c', 900000, 'a'))".to_owned(), "larger than 1 MiB"),
        (format!("SELECT replace({text}, 'a', {text})"), "larger than 1 MiB"),
        (format!("SELECT {}", [text; 8].join(", ")), "a row is larger than 2 MiB"),
        (format!("{endless} SELECT {text} FROM n LIMIT 1000"), "the answer is larger than 64 MiB"),
        (format!("SELECT group_concat(x) FROM (SELECT {text} AS x FROM samples)"), "larger than 1 MiB"),
        (format!("SELECT {text} LIKE '{}b'", "%a".repeat(500)), "LIKE or GLOB pattern too complex"),
        (format!("SELECT {} 1", "NOT ".repeat(5000)), "maximum depth 200"),
        (format!("SELECT '{}'", "x".repeat(70_000)), "longer than 64 KiB"),
    ] {
        let status = ask(&running, &sql).await.unwrap_err();
        assert!(status.message().contains(says), "{sql}: {status}");
    }
    // SQLite takes such a width for none.
    ask(&running, "SELECT printf('%2000000000d', 1), printf('%.2000000000f', 1.5)").await.unwrap();
    for sql in [
        format!("{endless} SELECT max(i) FROM n"),
        format!("SELECT sum(s0.value + s11.value) FROM {cross}"),
        format!("SELECT sum(f0.frame_id) FROM {}", cross.replace("samples s", "frames f")),
    ] {
        let status = ask_within(&running, &sql, 1000).await.unwrap_err();
        assert!(
            status.message().contains("longer than 1s") && status.message().contains("--sql-timeout"),
            "{sql}: {status}"
        );
    }
    assert_eq!(numbers(&running, "SELECT count(*) > 0 FROM samples").await, [1]);
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_and_read_bytes_have_limits() {
    let dir = tempfile::tempdir().unwrap();
    let running = start_with(dir.path(), |config| {
        config.sql.sql_read_bytes = ByteSize(3000);
        config.sql.sql_max_rows = 5;
    })
    .await;
    Pusher::open(running.grpc_addr).await.store_all(&batches(0, 9)).await;
    up_to_date(running.http_addr).await;
    let (_, rows, end) = ask_for(&running, "VALUES (1), (2), (3)", 2).await.unwrap();
    assert_eq!((rows.len(), end.more), (2, true));
    let (_, rows, end) = ask_for(&running, "VALUES (1), (2), (3)", 3).await.unwrap();
    assert_eq!((rows.len(), end.more), (3, false));
    let status = ask_for(&running, "SELECT 1", 6).await.unwrap_err();
    assert!(status.message().contains("at most 5 rows (--sql-max-rows)"), "{status}");
    let status = ask(&running, "SELECT * FROM frames").await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("--sql-read-bytes"), "{status}");
    running.shutdown().await;
}

/// Checks that an endless query of a client that leaves does not keep the next one waiting.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_query_ends_when_its_client_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let running = start_with(dir.path(), |config| config.sql.sql_timeout = TimeSpan::from_secs(600)).await;
    let sql = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n";
    for sql in [sql.to_owned(), sql.replace("max(i)", "i, printf('%.*c', 1000, 'a')")] {
        let request = SqlRequest { sql, max_rows: 100_000, timeout: None };
        let mut messages = queries(&running).await.sql(request).await.unwrap().into_inner();
        messages.message().await.unwrap().unwrap();
        let waiting = ask(&running, "SELECT 1");
        tokio::pin!(waiting);
        // The endless query has the only permit.
        assert!(tokio::time::timeout(Duration::from_millis(100), &mut waiting).await.is_err());
        drop(messages);
        tokio::time::timeout(TEST_TIMEOUT, waiting).await.expect("the next query runs").unwrap();
    }
    running.shutdown().await;
}

/// Checks that one collector of a bucket reads the tables that another one writes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sql_reads_the_tables_of_a_bucket() {
    let (s3, dir) = (S3::default(), tempfile::tempdir().unwrap());
    let endpoint = s3.serve().await;
    let mut running = Vec::new();
    for name in ["writer", "reader"] {
        let mut config = in_bucket(&dir.path().join(name), &endpoint);
        with_table(&mut config);
        running.push(Collector::start(config).await.unwrap());
    }
    let sent = batches(0, 9);
    Pusher::open(running[0].grpc_addr).await.store_all(&sent).await;
    let wanted: i64 = sent_sums(&sent).values().map(|(value, _)| value).sum();
    for running in &running {
        eventually("all samples", async || {
            numbers(running, "SELECT coalesce(sum(value), 0) FROM samples").await == [wanted]
        })
        .await;
    }
    for running in running {
        running.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_table_sql_names_its_flag() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let status = ask(&running, "SELECT 1").await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("start it with --table"), "{status}");
    running.shutdown().await;
}

/// Checks that a damaged file ends a query with its name, and a file that is gone with the advice to run it again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let running = start_with(dir.path(), |_| {}).await;
    Pusher::open(running.grpc_addr).await.store_all(&[batch("s", now_ms(), &[("main", 1)])]).await;
    up_to_date(running.http_addr).await;
    let table = dir.path().join("table");
    let files = crate::table::files_below(&table);
    let path = crate::table::active(&files, "frames").pop_first().unwrap();
    let sql = "SELECT * FROM frames";
    let whole = files[&path].to_vec();
    for (content, code) in [
        (&whole[..whole.len() - 9], Code::DataLoss),
        (&whole[..20], Code::DataLoss),
        (&[][..], Code::DataLoss),
    ] {
        std::fs::write(table.join(&path), content).unwrap();
        let status = ask(&running, sql).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(&path) && status.message().contains("repair"), "{status}");
    }
    std::fs::remove_file(table.join(&path)).unwrap();
    let status = ask(&running, sql).await.unwrap_err();
    assert!(status.message().contains("run the query again"), "{status}");
    running.shutdown().await;
}
