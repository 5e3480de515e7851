//! Verbs that make shell completions and man pages from a program's own description.

use std::{
    fs,
    io::{self, Write},
    path::PathBuf,
};

use clap::{Args, Command};
use clap_complete::Shell;

/// Arguments of the verb `completion`.
#[derive(Args, Clone, Debug)]
pub struct CompletionArgs {
    /// The shell to complete commands in
    shell: Shell,
}

/// Arguments of the verb `man`.
#[derive(Args, Clone, Debug)]
pub struct ManArgs {
    /// Write one page for each command into this directory, instead of the first page to standard output
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl CompletionArgs {
    /// Writes the completion script of `command`.
    pub fn write(&self, command: Command, out: &mut dyn Write) -> io::Result<()> {
        let mut script = Vec::new();
        let name = command.get_bin_name().unwrap_or(command.get_name()).to_owned();
        let mut command = command;
        clap_complete::generate(self.shell, &mut command, name, &mut script);
        out.write_all(&script)
    }
}

impl ManArgs {
    /// Writes the man page of `command`, or one page for each of its commands into the directory.
    pub fn write(&self, command: Command, out: &mut dyn Write) -> io::Result<()> {
        match &self.dir {
            None => clap_mangen::Man::new(command).render(out),
            Some(dir) => {
                fs::create_dir_all(dir)?;
                clap_mangen::generate_to(command, dir)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Arg;

    use super::*;

    fn command() -> Command {
        Command::new("gannet-test")
            .about("Tests")
            .subcommand(Command::new("run").arg(Arg::new("node").long("node")))
    }

    #[test]
    fn each_shell_completes_the_verbs() {
        for shell in [Shell::Bash, Shell::Elvish, Shell::Fish, Shell::PowerShell, Shell::Zsh] {
            let mut script = Vec::new();
            CompletionArgs { shell }.write(command(), &mut script).unwrap();
            assert!(String::from_utf8(script).unwrap().contains("node"), "{shell}");
        }
    }

    #[test]
    fn each_command_has_a_man_page() {
        let mut page = Vec::new();
        ManArgs { dir: None }.write(command(), &mut page).unwrap();
        assert!(String::from_utf8(page).unwrap().contains("gannet\\-test"));
        let directory = tempfile::tempdir().unwrap();
        let dir = directory.path().join("man");
        ManArgs { dir: Some(dir.clone()) }.write(command(), &mut Vec::new()).unwrap();
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert!(
            names.contains(&"gannet-test.1".into()) && names.contains(&"gannet-test-run.1".into()),
            "{names:?}"
        );
    }
}
