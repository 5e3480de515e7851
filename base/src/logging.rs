//! Logs to standard error, as text or as JSON.

use std::{fmt, io::IsTerminal as _};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

/// The form of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// Starts logging for the whole process. Call it once.
///
/// `variable` names the environment variable that holds the filter (`GANNET_AGENT_LOG=debug`); `filter` holds if the
/// variable is not set, or is wrong, which is logged.
pub fn init(format: LogFormat, variable: &str, filter: &str) {
    let (filter, wrong) = match std::env::var(variable).ok().filter(|text| !text.is_empty()) {
        None => (EnvFilter::new(filter), None),
        Some(text) => match EnvFilter::try_new(&text) {
            Ok(chosen) => (chosen, None),
            Err(error) => (EnvFilter::new(filter), Some(error)),
        },
    };
    let log = tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(filter);
    match format {
        LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().init(),
    }
    if let Some(error) = wrong {
        tracing::warn!(%error, "{variable} is not a log filter, the default is used: write it like info,kube=debug");
    }
}
