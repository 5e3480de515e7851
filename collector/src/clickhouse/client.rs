//! The HTTP interface of ClickHouse: one read-only statement at a time, with limits, whose rows arrive as a stream.

use std::{path::PathBuf, time::Duration};

use gannet_proto::connect;
use reqwest::{Client, Response, header::HeaderValue};
use ulid::Ulid;

use super::{
    ClickHouseError, ClickHouseOptions, ServerUrl,
    rows::{Row, RowError},
};
use crate::{metrics::Metrics, tls};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time beyond the limit of a statement until the collector gives up: the server ends it first, with its own error.
const GRACE: Duration = Duration::from_secs(5);
/// Limit of an answer in bytes, which the server keeps too.
const MAX_ANSWER_BYTES: u64 = 512 << 20;
/// Bytes of an error that the collector reads.
const MAX_ERROR_BYTES: usize = 4 << 10;
/// Bytes of an error that a user sees.
const SHOWN_ERROR_BYTES: usize = 400;
/// Bytes of a statement, for lists of ids and values.
const MAX_STATEMENT_BYTES: usize = 64 << 20;

/// The client of one server.
pub(super) struct HttpInterface {
    client: Client,
    server: ServerUrl,
    user: Option<String>,
    password_file: Option<PathBuf>,
    timeout: Duration,
    memory_bytes: u64,
    metrics: Metrics,
}

impl HttpInterface {
    /// Builds the client, which connects with the first statement. An error names the option.
    pub(super) fn new(
        server: &ServerUrl,
        options: &ClickHouseOptions,
        metrics: Metrics,
    ) -> Result<Self, String> {
        let roots = if server.is_secure() {
            let pem = connect::authority(options.query_ca.as_deref()).map_err(|error| error.to_string())?;
            tls::client_roots(&pem)?
        } else {
            Vec::new()
        };
        let client = tls::http_client(roots)
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(options.query_timeout.0 + GRACE)
            .build()
            .map_err(|error| connect::innermost(&error))?;
        Ok(Self {
            client,
            server: server.clone(),
            user: options.query_user.clone(),
            password_file: options.query_password_file.clone(),
            timeout: options.query_timeout.0,
            memory_bytes: options.query_memory_bytes.0,
            metrics,
        })
    }

    /// Runs a statement in the format RowBinary, and calls `each` for every row. Returns the bytes that the server has read, by its own
    /// count. Dropping the future ends the statement on the server.
    pub(super) async fn select(
        &self,
        statement: String,
        each: impl FnMut(&mut Row<'_>) -> Result<(), RowError>,
    ) -> Result<u64, ClickHouseError> {
        let outcome = self.run(statement, each).await;
        let outcome_name = match &outcome {
            Ok(_) => "answered",
            Err(ClickHouseError::Limit(_)) => "limit",
            Err(_) => "failed",
        };
        self.metrics.clickhouse_statement(outcome_name);
        if let Err(error) = &outcome {
            tracing::warn!(%error, "ClickHouse did not answer a query");
        }
        outcome
    }

    async fn run(
        &self,
        statement: String,
        mut each: impl FnMut(&mut Row<'_>) -> Result<(), RowError>,
    ) -> Result<u64, ClickHouseError> {
        if statement.len() > MAX_STATEMENT_BYTES {
            return Err(ClickHouseError::Limit(
                "the statement for ClickHouse is too long: choose a shorter range or fewer series".to_owned(),
            ));
        }
        let id = format!("gannet-{}", Ulid::new());
        tracing::debug!(query_id = id, bytes = statement.len(), "sending a statement to ClickHouse");
        let mut request = self.client.post(self.url(&id)).body(statement);
        if let Some(user) = &self.user {
            request = request.header("X-ClickHouse-User", user);
        }
        if let Some(file) = &self.password_file {
            let password = tokio::fs::read_to_string(file).await.map_err(|error| {
                ClickHouseError::Password { file: file.clone(), reason: connect::innermost(&error) }
            })?;
            let mut value =
                HeaderValue::from_str(password.trim()).map_err(|_| ClickHouseError::Password {
                    file: file.clone(),
                    reason: "it holds a character that a header cannot carry".to_owned(),
                })?;
            value.set_sensitive(true);
            request = request.header("X-ClickHouse-Key", value);
        }
        let mut response = request.send().await.map_err(|error| self.broken(&error))?;
        if !response.status().is_success() {
            return Err(self.refused(response).await);
        }
        let read = self.count(&response);
        let (mut left, mut buffer) = (MAX_ANSWER_BYTES, Vec::new());
        while let Some(chunk) = response.chunk().await.map_err(|error| self.broken(&error))? {
            left = left.checked_sub(chunk.len() as u64).ok_or_else(too_large)?;
            buffer.extend_from_slice(&chunk);
            let mut done = 0;
            loop {
                let mut row = Row::new(&buffer[done..]);
                if done == buffer.len() {
                    break;
                }
                match each(&mut row) {
                    Ok(()) => done += row.end(),
                    Err(RowError::Cut) => break,
                    Err(RowError::Damaged) => return Err(self.damaged()),
                    Err(RowError::TooMany) => return Err(too_large()),
                }
            }
            buffer.drain(..done);
        }
        if buffer.is_empty() { Ok(read) } else { Err(self.damaged()) }
    }

    /// Returns the URL with the settings of a statement.
    fn url(&self, id: &str) -> url::Url {
        let mut url = self.server.0.clone();
        url.query_pairs_mut().extend_pairs([
            ("query_id", id),
            // Reads only, but the statement may choose settings.
            ("readonly", "2"),
            // The server ends the statement when the collector closes the connection.
            ("cancel_http_readonly_queries_on_client_close", "1"),
            // The status of the answer then includes failures in the middle of it.
            ("wait_end_of_query", "1"),
            ("max_execution_time", &self.timeout.as_secs().max(1).to_string()),
            ("max_memory_usage", &self.memory_bytes.to_string()),
            ("max_result_bytes", &MAX_ANSWER_BYTES.to_string()),
            ("result_overflow_mode", "throw"),
            ("max_query_size", &MAX_STATEMENT_BYTES.to_string()),
            ("max_ast_elements", "10000000"),
            ("max_expanded_ast_elements", "10000000"),
        ]);
        url
    }

    /// Counts what the server has read. Returns the bytes.
    fn count(&self, response: &Response) -> u64 {
        let summary = response.headers().get("X-ClickHouse-Summary").and_then(|value| value.to_str().ok());
        let summary: serde_json::Value =
            summary.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        let number = |name: &str| summary[name].as_str().and_then(|text| text.parse().ok()).unwrap_or(0_u64);
        let bytes = number("read_bytes");
        self.metrics.clickhouse_read_bytes.inc_by(bytes);
        self.metrics.clickhouse_read_rows.inc_by(number("read_rows"));
        bytes
    }

    fn broken(&self, error: &reqwest::Error) -> ClickHouseError {
        let server = self.server.to_string();
        if error.is_timeout() && !error.is_connect() {
            return ClickHouseError::Limit(self.too_slow());
        }
        ClickHouseError::Away { server, reason: connect::innermost(error) }
    }

    fn damaged(&self) -> ClickHouseError {
        ClickHouseError::Away {
            server: self.server.to_string(),
            reason: "its answer is cut or is not RowBinary".to_owned(),
        }
    }

    fn too_slow(&self) -> String {
        format!(
            "ClickHouse needs more than {} s (--query-timeout): choose a shorter range or fewer series",
            self.timeout.as_secs()
        )
    }

    /// Reads the error of an answer.
    async fn refused(&self, mut response: Response) -> ClickHouseError {
        let status = response.status();
        let code = response.headers().get("X-ClickHouse-Exception-Code");
        let code = code.and_then(|value| value.to_str().ok()?.parse::<u32>().ok());
        let mut body = Vec::new();
        while body.len() < MAX_ERROR_BYTES
            && let Ok(Some(chunk)) = response.chunk().await
        {
            body.extend_from_slice(&chunk);
        }
        body.truncate(MAX_ERROR_BYTES);
        let body = String::from_utf8_lossy(&body);
        let first = body.lines().next().unwrap_or_default().trim();
        let reason = gannet_base::head(first, SHOWN_ERROR_BYTES).to_owned();
        let server = self.server.to_string();
        let Some(code) = code else {
            return ClickHouseError::Away {
                server,
                reason: format!("it answers {status}, and not like ClickHouse: {reason}"),
            };
        };
        match code {
            // REQUIRED_PASSWORD, UNKNOWN_USER, WRONG_PASSWORD, AUTHENTICATION_FAILED, IP_ADDRESS_NOT_ALLOWED
            192..=195 | 516 => ClickHouseError::Login {
                server,
                user: self.user.clone().unwrap_or_else(|| "default".to_owned()),
            },
            // UNKNOWN_FUNCTION, UNKNOWN_SETTING
            46 | 115 => ClickHouseError::TooOld { server, reason },
            // READONLY
            164 => ClickHouseError::Readonly { server, reason },
            // ACCESS_DENIED
            497 => ClickHouseError::Rights { server, reason },
            // MEMORY_LIMIT_EXCEEDED
            241 => ClickHouseError::Limit(format!(
                "ClickHouse needs more than {} MiB of memory (--query-memory-bytes): choose a shorter range or fewer series",
                self.memory_bytes >> 20
            )),
            // TIMEOUT_EXCEEDED, TOO_SLOW
            159 | 160 => ClickHouseError::Limit(self.too_slow()),
            // TOO_MANY_ROWS, TOO_MANY_BYTES, TOO_MANY_ROWS_OR_BYTES
            158 | 307 | 396 => too_large(),
            // TOO_MANY_SIMULTANEOUS_QUERIES, and QUERY_WAS_CANCELLED by an administrator
            202 | 394 => ClickHouseError::Busy { server },
            // FILE_DOESNT_EXIST, DATABASE_ACCESS_DENIED (a path outside of user_files), NAMED_COLLECTION_DOESNT_EXIST, S3_ERROR,
            // DELTA_KERNEL_ERROR
            107 | 291 | 669 | 499 | 742 => ClickHouseError::Tables { server, reason },
            _ => ClickHouseError::Failed { server, reason },
        }
    }
}

fn too_large() -> ClickHouseError {
    ClickHouseError::Limit(
        "the merged profile has too many distinct stacks: choose a shorter range or fewer series".to_owned(),
    )
}
