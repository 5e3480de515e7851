//! Labels for samples that show how a process was started: its command line, working directory and some environment
//! variables. All of them are off by default, bounded, and redacted: they may hold secrets.

use std::{collections::BTreeSet, fmt, sync::Arc};

use regex::{Captures, Regex, RegexBuilder};

use super::{
    metadata::{MAX_TEXT_BYTES, variables},
    proc::{self, ProcError, ProcFs},
};
use crate::model::ProcessKey;

/// Variables that a user can allow.
const MAX_VARIABLES: usize = 16;
/// Longest name of a variable.
const MAX_NAME: usize = 64;
/// Bytes of a label's value. Longer texts end with `…`.
const MAX_VALUE: usize = 256;
/// Bytes of the label `cmdline`.
const MAX_CMDLINE: usize = 512;
/// Bytes of a text that are searched for secrets. What lies behind is dropped.
const MAX_SEARCHED: usize = 4096;
/// Memory for a compiled expression.
const MAX_REGEX_BYTES: usize = 1 << 20;
/// Stands in the place of a secret.
const REDACTED: &str = "[redacted]";
/// Before the name of a variable in its label.
const VARIABLE: &str = "env_";

/// The texts that are secrets, unless the user gives another expression. Its groups, in this order: the value behind a name that
/// sounds like a secret; the password in a URL; keys and tokens of a known form.
pub(crate) const DEFAULT_REDACT: &str = concat!(
    r"(?i:pass(?:word|wd|phrase)?|pwd|secret|token|credential|auth(?:orization)?|(?:api|access|private|signing|encryption)[-_.]?key)",
    r"[^\x00=: ]*(?:[=:\x00]|\s)[ \x22']*((?i:(?:bearer|basic) +)?[^\x00\s\x22']+)",
    r"|://[^/\x00@\s:]*:([^/\x00@\s]+)@",
    r"|\b((?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[0-9A-Za-z]{20,}|glpat-[0-9A-Za-z_-]{20,}|xox[abprs]-[0-9A-Za-z-]{10,}|eyJ[\w-]+\.[\w-]+\.[\w-]*)",
);

/// The labels that samples get, and the parts of their texts that are secret.
#[derive(Clone, Debug)]
pub struct StartLabelOptions {
    cmdline: bool,
    cwd: bool,
    variables: BTreeSet<String>,
    redact: Regex,
}

/// Why labels cannot be made as the user asks.
#[derive(Debug, thiserror::Error)]
pub enum StartLabelError {
    /// A name that no variable has.
    #[error("--label-env {0}: give the name of a variable, at most 64 letters, digits and underscores")]
    Name(String),
    /// Too many variables.
    #[error("--label-env: {0} variables are given, give at most 16: each makes profiles larger")]
    Count(usize),
    /// The expression cannot be used.
    #[error("--label-redact: {0}; give a regular expression in the syntax of the Rust crate regex")]
    Redact(#[source] Box<regex::Error>),
}

impl StartLabelOptions {
    /// Builds the options; `None` if the user asks for no label. `redact` replaces the usual expression. If it has groups, only
    /// the texts of the groups are secret, else all that it matches. The arguments of a command line are separated by NULs.
    pub fn new(
        cmdline: bool,
        cwd: bool,
        variables: &[String],
        redact: Option<&str>,
    ) -> Result<Option<Self>, StartLabelError> {
        if variables.len() > MAX_VARIABLES {
            return Err(StartLabelError::Count(variables.len()));
        }
        let is_name = |name: &String| {
            let is_part = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
            (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(is_part)
        };
        if let Some(name) = variables.iter().find(|name| !is_name(name)) {
            return Err(StartLabelError::Name(name.clone()));
        }
        let redact = RegexBuilder::new(redact.unwrap_or(DEFAULT_REDACT))
            .size_limit(MAX_REGEX_BYTES)
            .build()
            .map_err(|error| StartLabelError::Redact(Box::new(error)))?;
        let variables: BTreeSet<String> = variables.iter().cloned().collect();
        let wants_any = cmdline || cwd || !variables.is_empty();
        Ok(wants_any.then_some(Self { cmdline, cwd, variables, redact }))
    }

    /// Reads the labels of a process, and checks that it was this one all the time. It reads 128 KiB of each file at most.
    pub(super) fn read(&self, proc: &dyn ProcFs, key: ProcessKey) -> Result<StartLabels, ProcError> {
        let is_kernel_thread = proc::check_in(proc, key)?.kernel_thread;
        let mut labels = Vec::new();
        if is_kernel_thread {
            return Ok(StartLabels(labels));
        }
        let mut add = |name: String, value: String| {
            if !value.is_empty() {
                labels.push((name, value));
            }
        };
        if self.cmdline {
            let bytes = proc::bytes(proc, key, "cmdline", MAX_TEXT_BYTES)?;
            let text = self.without_secrets(&String::from_utf8_lossy(&bytes));
            add("cmdline".into(), cut(text.trim_end_matches('\0').replace('\0', " "), MAX_CMDLINE));
        }
        if self.cwd {
            add("cwd".into(), cut(self.without_secrets(&proc::link(proc, key, "cwd")?), MAX_VALUE));
        }
        if !self.variables.is_empty() {
            for (name, value) in variables(proc, key, |name| self.variables.contains(name))? {
                // The name counts: that of a password is DB_PASSWORD.
                let text = self.without_secrets(&format!("{name}={value}"));
                let value = text.strip_prefix(&format!("{name}=")).unwrap_or(REDACTED);
                add(VARIABLE.to_owned() + &name, cut(value.to_owned(), MAX_VALUE));
            }
        }
        proc::check_in(proc, key)?;
        Ok(StartLabels(labels))
    }

    /// Replaces the secrets in the first 4 KiB of a text, and drops the rest.
    fn without_secrets(&self, text: &str) -> String {
        let text = gannet_base::head(text, MAX_SEARCHED);
        let redacted = self.redact.replace_all(text, |found: &Captures<'_>| {
            let whole = &found[0];
            let start = found.get(0).map_or(0, |all| all.start());
            let (mut text, mut end) = (String::new(), 0);
            // In the order of their beginnings: a group inside another one begins before its end.
            for group in found.iter().skip(1).flatten() {
                let range = group.start() - start..group.end() - start;
                if range.start >= end {
                    text += &whole[end..range.start];
                    text += REDACTED;
                    end = range.end;
                }
            }
            if end == 0 { REDACTED.to_owned() } else { text + &whole[end..] }
        });
        redacted.into_owned()
    }
}

/// Cuts a text to this number of bytes.
fn cut(mut text: String, max: usize) -> String {
    gannet_base::cut(&mut text, max);
    text
}

/// The labels of one process. `Debug` shows no values.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct StartLabels(Vec<(String, String)>);

impl StartLabels {
    /// Returns names and values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

impl fmt::Debug for StartLabels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{} labels>", self.0.len())
    }
}

/// The labels of one image of a process, and when they were read.
#[derive(Clone, Debug)]
pub(super) struct ReadStartLabels {
    /// By the boot clock.
    pub(super) at_ns: u64,
    /// None if the process could not be read.
    pub(super) labels: Option<Arc<StartLabels>>,
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs};

    use proptest::prelude::*;

    use super::*;
    use crate::process::RealProc;

    fn options(variables: &[&str], redact: Option<&str>) -> StartLabelOptions {
        let variables: Vec<String> = variables.iter().map(|name| (*name).to_owned()).collect();
        StartLabelOptions::new(true, true, &variables, redact).unwrap().unwrap()
    }

    /// Reads a process with these arguments and variables, separated by spaces.
    fn labels(options: &StartLabelOptions, cmdline: &[u8], environ: &[u8]) -> BTreeMap<String, String> {
        let root = tempfile::tempdir().unwrap();
        let process = root.path().join("7");
        fs::create_dir(&process).unwrap();
        let stat = "7 (x) S 1 1 1 0 -1 0 0 0 0 0 1 2 3 4 20 0 1 0 100 0 0\n";
        for (file, bytes) in [("stat", stat.as_bytes()), ("cmdline", cmdline), ("environ", environ)] {
            fs::write(process.join(file), bytes).unwrap();
        }
        std::os::unix::fs::symlink("/srv/app", process.join("cwd")).unwrap();
        let key = ProcessKey { tgid: 7, start_boottime_ns: crate::model::boot_time_of_ticks(100) };
        let read = options.read(&RealProc::at(root.path()), key).unwrap();
        assert!(format!("{read:?}").ends_with(" labels>"));
        read.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn only_what_the_user_asks_for_is_read() {
        assert!(StartLabelOptions::new(false, false, &[], None).unwrap().is_none());
        let read = labels(
            &options(&["VERSION", "ABSENT"], None),
            b"serve\0--port\080\0",
            b"HOME=/root\0VERSION=1.2\0",
        );
        let expected = [("cmdline", "serve --port 80"), ("cwd", "/srv/app"), ("env_VERSION", "1.2")];
        assert_eq!(read, expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    }

    #[test]
    fn secrets_are_redacted_by_name_and_by_form() {
        const SECRET: &str = "s3cr3t-of-the-test";
        for line in [
            "serve\0--password=@\0--port=80",
            "serve\0--password\0@\0--port=80",
            "serve\0--db-passwd=\"@\"\0--port=80",
            "sh\0-c\0serve --token @ --port=80",
            "curl\0-H\0Authorization: Bearer @\0--port=80",
            "curl\0-H\0X-Api-Key: @\0--port=80",
            "serve\0postgres://admin:@@db/x\0--port=80",
            "serve\0-Dspring.datasource.password=@\0--port=80",
            "env\0AWS_SECRET_ACCESS_KEY=@\0--port=80",
        ] {
            let line = line.replacen('@', SECRET, 1);
            let read = &labels(&options(&[], None), line.as_bytes(), b"")["cmdline"];
            assert!(!read.contains(SECRET) && read.contains(REDACTED), "{line:?}: {read}");
            assert!(read.ends_with("--port=80"), "the rest stays: {read}");
        }
        let known =
            ["AKIAABCDEFGHIJKLMNOP", "ghp_0123456789abcdefghijABCDEFGHIJ", "eyJhbGciOi.eyJzdWIiOi.c2ln"];
        for token in known {
            let read = &labels(&options(&[], None), format!("serve\0{token}").as_bytes(), b"")["cmdline"];
            assert_eq!(read, "serve [redacted]");
        }
        let read =
            labels(&options(&["DB_PASSWORD", "URL"], None), b"", b"DB_PASSWORD=x\0URL=redis://:y@h/0\0");
        assert_eq!(read["env_DB_PASSWORD"], REDACTED);
        assert_eq!(read["env_URL"], "redis://:[redacted]@h/0");
    }

    #[test]
    fn an_own_expression_replaces_the_usual_one() {
        let own = options(&[], Some("--customer=[0-9]+"));
        let read = &labels(&own, b"serve\0--customer=4711\0--password=x", b"")["cmdline"];
        assert_eq!(read, "serve [redacted] --password=x");
        let groups = options(&[], Some("(a(b))c(d)"));
        assert_eq!(labels(&groups, b"xabcdx", b"")["cmdline"], "x[redacted]c[redacted]x");
    }

    #[test]
    fn wrong_options_are_refused_with_the_cure() {
        let new = |variables: &[&str], redact| {
            let variables: Vec<String> = variables.iter().map(|name| (*name).to_owned()).collect();
            StartLabelOptions::new(false, false, &variables, redact).unwrap_err().to_string()
        };
        assert!(new(&["A=B"], None).contains("--label-env A=B"));
        assert!(new(&[""], None).contains("give the name"));
        assert!(new(&["A"; 17], None).contains("at most 16"));
        assert!(new(&[], Some("(")).contains("--label-redact: "));
        assert!(new(&[], Some(r"\w{9999}{999}")).contains("--label-redact: "));
    }

    proptest! {
        // Few, because each compiles the expression.
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Checks that no text makes the redaction panic, and that labels are bounded.
        #[test]
        fn any_text_becomes_a_bounded_label(
            cmdline in "(?s)(pass|token=|://|:|@|\0| |é|.){0,300}",
            repeat in 1_usize..40,
            own in prop::bool::ANY,
        ) {
            let options = options(&["A"], own.then_some("(.)(p)?|x"));
            let environ = format!("A={}", cmdline.replace('\0', "").repeat(repeat));
            let read = labels(&options, cmdline.repeat(repeat).as_bytes(), environ.as_bytes());
            for (name, value) in read {
                let max = if name == "cmdline" { MAX_CMDLINE } else { MAX_VALUE };
                prop_assert!(value.len() <= max);
                prop_assert!(!value.contains('\0'));
            }
        }
    }
}
