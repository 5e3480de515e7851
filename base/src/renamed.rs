//! Options that have changed their names. An old name ends the program with one line that has the new one.

use std::ffi::{OsStr, OsString};

use clap::{
    ArgMatches, Command,
    error::{ContextKind, ContextValue, ErrorKind},
};

/// Old and new names of the flags and the variables of one program.
#[derive(Clone, Copy, Debug, Default)]
pub struct Renamed {
    /// Flags with their dashes: `("--collector", "--endpoint")`.
    pub flags: &'static [(&'static str, &'static str)],
    /// Environment variables: `("GANNET_COLLECTOR", "GANNET_ENDPOINT")`.
    pub variables: &'static [(&'static str, &'static str)],
}

impl Renamed {
    /// Reads a command line, the program's own name first, and refuses old names of flags and of variables in the
    /// environment of this process.
    pub fn matches(
        &self,
        command: Command,
        arguments: impl IntoIterator<Item = OsString>,
    ) -> Result<ArgMatches, clap::Error> {
        self.check_variables(std::env::vars_os())?;
        command.try_get_matches_from(arguments).map_err(|error| self.explain(error))
    }

    /// Returns an error for the first old variable that the environment holds, for example `std::env::vars_os()`.
    ///
    /// Only exact names count: Kubernetes adds variables such as `GANNET_COLLECTOR_PORT` for a Service of that name.
    pub fn check_variables<N: AsRef<OsStr>, V>(
        &self,
        environment: impl IntoIterator<Item = (N, V)>,
    ) -> Result<(), clap::Error> {
        for (name, _) in environment {
            if let Some((old, new)) = self.variables.iter().find(|(old, _)| name.as_ref() == *old) {
                return Err(one_line(&format!("the environment variable {old} is now {new}")));
            }
        }
        Ok(())
    }

    /// Turns clap's error about an unknown flag into one that names the new flag. Other errors stay as they are.
    pub fn explain(&self, error: clap::Error) -> clap::Error {
        let (ErrorKind::UnknownArgument, Some(ContextValue::String(unknown))) =
            (error.kind(), error.get(ContextKind::InvalidArg))
        else {
            return error;
        };
        match self.flags.iter().find(|(old, _)| old == unknown) {
            Some((old, new)) => one_line(&format!("{old} is now {new}")),
            None => error,
        }
    }

    /// Returns the new name of a key of the config file.
    pub(crate) fn key(&self, key: &str) -> Option<String> {
        let flag = format!("--{}", key.replace('_', "-"));
        let (_, new) = self.flags.iter().find(|(old, _)| *old == flag)?;
        Some(new.trim_start_matches("--").split(' ').next()?.replace('-', "_"))
    }
}

/// Builds an error that prints as `error: …` and ends the program with code 2.
fn one_line(message: &str) -> clap::Error {
    clap::Error::raw(ErrorKind::UnknownArgument, format!("{message}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RENAMED: Renamed = Renamed {
        flags: &[("--collector", "--endpoint"), ("--log-json", "--log-format json")],
        variables: &[("GANNET_COLLECTOR", "GANNET_ENDPOINT")],
    };

    #[test]
    fn an_old_flag_gives_one_line_with_the_new_one() {
        for word in ["--collector", "--collector=x"] {
            let error = Command::new("test").try_get_matches_from(["test", word]).unwrap_err();
            let error = RENAMED.explain(error);
            assert_eq!(error.to_string(), "error: --collector is now --endpoint\n");
            assert_eq!(error.exit_code(), 2);
        }
        let error = Command::new("test").try_get_matches_from(["test", "--colour"]).unwrap_err();
        assert!(RENAMED.explain(error).to_string().contains("unexpected argument '--colour'"));
    }

    #[test]
    fn an_old_variable_gives_one_line_with_the_new_one() {
        let error = RENAMED.check_variables([("PATH", ""), ("GANNET_COLLECTOR", "")]).unwrap_err();
        let line = "error: the environment variable GANNET_COLLECTOR is now GANNET_ENDPOINT\n";
        assert_eq!((error.to_string().as_str(), error.exit_code()), (line, 2));
    }

    #[test]
    fn a_service_link_is_no_old_variable() {
        let links = ["GANNET_COLLECTOR_PORT", "GANNET_COLLECTOR_SERVICE_HOST", "GANNET"];
        assert!(RENAMED.check_variables(links.map(|name| (name, "tcp://10.0.0.1:4100"))).is_ok());
    }

    #[test]
    fn an_old_key_has_the_new_name_of_its_flag() {
        assert_eq!(RENAMED.key("collector").as_deref(), Some("endpoint"));
        assert_eq!(RENAMED.key("log_json").as_deref(), Some("log_format"));
        assert_eq!(RENAMED.key("node"), None);
    }
}
