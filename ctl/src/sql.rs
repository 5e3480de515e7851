//! `profiles query`: SQL over the tables of the collector.

use std::{
    collections::HashSet,
    fmt::Write as _,
    io::{self, Read as _},
};

use gannet_proto::query::{
    SqlRequest, SqlResponse,
    sql_response::{End, Message, Progress, Row, Value as Cell, value::Kind},
};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

use crate::{
    args::{Format, SqlArgs},
    client::Collector,
    error::Error,
    render::{Console, bytes, count, wide_table},
};

/// Bytes of a query that is read from standard input.
const MAX_SQL_BYTES: u64 = 1 << 20;

/// The answer of a query.
#[derive(Debug, Default)]
struct Answer {
    columns: Vec<String>,
    rows: Vec<Row>,
    progress: Progress,
    /// The query has more rows.
    more: bool,
}

pub(crate) async fn run(
    args: &SqlArgs,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let SqlArgs { sql, limit, timeout, csv } = args;
    let sql = match sql.as_str() {
        "-" => read_input()?,
        sql => sql.to_owned(),
    };
    let timeout = timeout.and_then(|timeout| prost_types::Duration::try_from(timeout.0).ok());
    let answer = receive(SqlRequest { sql, max_rows: *limit, timeout }, collector).await?;
    if *csv {
        if answer.more {
            // A closed standard error must not fail the command.
            let _ = writeln!(console.err, "gannetctl: {}", more(&answer));
        }
        console.out.write_all(answer.csv().as_bytes())?;
        return Ok(console.out.flush()?);
    }
    if format != Format::Table {
        answer.check_names()?;
    }
    console.show(format, || answer.json(), || answer.table())
}

fn read_input() -> Result<String, Error> {
    let fault = |source| Error::File { file: "standard input".to_owned(), source };
    let mut sql = String::new();
    io::stdin().lock().take(MAX_SQL_BYTES).read_to_string(&mut sql).map_err(fault)?;
    Ok(sql)
}

async fn receive(request: SqlRequest, collector: &Collector) -> Result<Answer, Error> {
    let mut messages =
        collector.query().sql(request).await.map_err(|status| collector.fault(&status))?.into_inner();
    // It draws on standard error, and only if that is a terminal.
    let bar = ProgressBar::new_spinner().with_style(
        ProgressStyle::with_template("{spinner} {msg}").unwrap_or_else(|_| ProgressStyle::default_spinner()),
    );
    let mut answer = Answer::default();
    loop {
        let message = messages.message().await;
        match message.map_err(|status| collector.fault(&status))? {
            Some(SqlResponse { message: Some(Message::Columns(columns)) }) => answer.columns = columns.names,
            Some(SqlResponse { message: Some(Message::Rows(rows)) }) => {
                let columns = answer.columns.len();
                answer.rows.extend(rows.rows.into_iter().map(|mut row| {
                    row.values.resize(columns, Cell::default());
                    row
                }));
            }
            Some(SqlResponse { message: Some(Message::Progress(progress)) }) => {
                bar.set_message(format!("read {}", read(&progress)));
                bar.tick();
            }
            Some(SqlResponse { message: Some(Message::End(End { progress, more })) }) => {
                bar.finish_and_clear();
                return Ok(Answer { progress: progress.unwrap_or_default(), more, ..answer });
            }
            Some(SqlResponse { message: None }) => {}
            None => {
                return Err(Error::Failed(
                    "the collector ended its answer before the last row; try again".to_owned(),
                ));
            }
        }
    }
}

fn read(progress: &Progress) -> String {
    let Progress { row_groups_read, bytes_read, rows_read } = progress;
    format!(
        "{} of {} in {}",
        bytes(*bytes_read),
        count(*rows_read as usize, "row"),
        count(*row_groups_read as usize, "row group")
    )
}

fn more(answer: &Answer) -> String {
    format!("the first {}; there are more, --limit N shows N", count(answer.rows.len(), "row"))
}

/// Formats a value for people. NULL is empty.
fn text(cell: &Cell) -> String {
    match &cell.kind {
        None => String::new(),
        Some(Kind::Integer(value)) => value.to_string(),
        Some(Kind::Real(value)) => value.to_string(),
        Some(Kind::Text(text)) => text.clone(),
        Some(Kind::Blob(bytes)) => hex(bytes),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn value(cell: &Cell) -> Value {
    match &cell.kind {
        None => Value::Null,
        Some(Kind::Integer(value)) => (*value).into(),
        // JSON has no infinity.
        Some(Kind::Real(value)) => serde_json::Number::from_f64(*value).map_or(Value::Null, Value::Number),
        Some(Kind::Text(text)) => text.as_str().into(),
        Some(Kind::Blob(bytes)) => hex(bytes).into(),
    }
}

/// Adds a field of a CSV line, in quotes if it needs them (RFC 4180).
fn push_field(line: &mut String, text: &str) {
    if text.contains(['"', ',', '\n', '\r']) {
        let _ = write!(line, "\"{}\"", text.replace('"', "\"\""));
    } else {
        line.push_str(text);
    }
}

impl Answer {
    /// Rows in JSON have their values by the names of the columns.
    fn check_names(&self) -> Result<(), Error> {
        let mut names = HashSet::new();
        match self.columns.iter().find(|name| !names.insert(*name)) {
            None => Ok(()),
            Some(name) => Err(Error::Failed(format!(
                "two columns have the name `{name}`, which json and yaml cannot show; rename one with AS"
            ))),
        }
    }

    fn json(&self) -> Value {
        let row = |row: &Row| {
            let fields = self.columns.iter().cloned().zip(row.values.iter().map(value));
            Value::Object(fields.collect::<Map<_, _>>())
        };
        let Progress { row_groups_read, bytes_read, rows_read } = self.progress;
        json!({
            "columns": self.columns, "rows": self.rows.iter().map(row).collect::<Vec<_>>(), "more": self.more,
            "row_groups_read": row_groups_read, "bytes_read": bytes_read, "rows_read": rows_read,
        })
    }

    fn table(&self) -> String {
        let is_number = |column: usize| {
            self.rows.iter().any(|row| row.values[column].kind.is_some())
                && self.rows.iter().all(|row| {
                    matches!(row.values[column].kind, None | Some(Kind::Integer(_) | Kind::Real(_)))
                })
        };
        let columns: Vec<(&str, bool)> = self
            .columns
            .iter()
            .enumerate()
            .map(|(number, name)| (name.as_str(), is_number(number)))
            .collect();
        let rows: Vec<Vec<String>> =
            self.rows.iter().map(|row| row.values.iter().map(text).collect()).collect();
        let mut out = wide_table(&columns, rows.iter().map(Vec::as_slice));
        let shown = if self.more { more(self) } else { count(self.rows.len(), "row") };
        let _ = writeln!(out, "{shown}; read {}", read(&self.progress));
        out
    }

    fn csv(&self) -> String {
        let mut out = String::new();
        let names = self.columns.clone();
        let rows = self.rows.iter().map(|row| row.values.iter().map(text).collect());
        for row in std::iter::once(names).chain(rows) {
            for (number, field) in row.iter().enumerate() {
                if number > 0 {
                    out.push(',');
                }
                push_field(&mut out, field);
            }
            out.push_str("\r\n");
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> Answer {
        let row = |values: Vec<Option<Kind>>| Row {
            values: values.into_iter().map(|kind| Cell { kind }).collect(),
        };
        Answer {
            columns: vec!["function".to_owned(), "value".to_owned(), "hash".to_owned()],
            rows: vec![
                row(vec![Some(Kind::Text("f(int, char)".to_owned())), Some(Kind::Integer(12)), None]),
                row(vec![
                    Some(Kind::Text("a \"b\"\x1b".to_owned())),
                    Some(Kind::Real(0.5)),
                    Some(Kind::Blob(vec![1, 255])),
                ]),
            ],
            progress: Progress { row_groups_read: 1, bytes_read: 2048, rows_read: 10 },
            more: true,
        }
    }

    #[test]
    fn a_table_aligns_numbers_and_says_what_was_read() {
        insta::assert_snapshot!(answer().table(), @r#"
        function      value  hash
        f(int, char)     12
        a "b"�          0.5  01ff
        the first 2 rows; there are more, --limit N shows N; read 2.0 KiB of 10 rows in 1 row group
        "#);
    }

    #[test]
    fn csv_quotes_what_would_end_a_field() {
        assert_eq!(
            answer().csv(),
            "function,value,hash\r\n\"f(int, char)\",12,\r\n\"a \"\"b\"\"\u{1b}\",0.5,01ff\r\n"
        );
    }

    #[test]
    fn rows_in_json_have_their_values_by_name() {
        let mut answer = answer();
        let json = answer.json();
        assert_eq!(json["rows"][1], json!({ "function": "a \"b\"\u{1b}", "value": 0.5, "hash": "01ff" }));
        assert_eq!((&json["rows"][0]["hash"], &json["more"]), (&Value::Null, &json!(true)));
        answer.check_names().unwrap();
        answer.columns[2] = "value".to_owned();
        assert!(answer.check_names().unwrap_err().to_string().contains("AS"));
    }
}
