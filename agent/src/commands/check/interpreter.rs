//! Check of one process: whether the names of its interpreted functions can be read.

use std::io;

use super::Check;
use crate::{
    access::{self, Target},
    model::ProcessKey,
    process::CodeList,
    runtimes::{Attachment, RuntimeFile, WhyNot, inspect},
};

const NAME: &str = "interpreter";

pub(super) fn interpreter(pid: u32) -> Check {
    let inspected =
        access::node().compute(Target::Process(pid), "its interpreter", move || inspect_names(pid));
    match inspected {
        Err(unanswered) => Check::warning(
            NAME,
            unanswered.to_string(),
            "wait until its memory and the file systems of its programs answer",
        ),
        Ok(Err(error)) => Check::warning(
            NAME,
            format!("cannot read the mappings of process {pid}: {error}"),
            "give the id of a running process, and run as root",
        ),
        Ok(Ok(None)) => Check::ok(
            NAME,
            format!("process {pid} runs no interpreter that the agent knows: it has native frames"),
        ),
        Ok(Ok(Some((file, names)))) => {
            let (name, version) = file.names();
            let runtime = format!("process {pid} runs {}", format!("{name} {version}").trim_end());
            match names {
                Ok(None) => match file.runtime.lack(&file.detected) {
                    None => Check::ok(NAME, runtime),
                    Some(lack) => {
                        Check::warning(NAME, format!("{runtime}, whose functions {}", lack.what), lack.cure)
                    }
                },
                Ok(Some(list)) => Check::ok(
                    NAME,
                    format!("{runtime}, whose functions have the names of its {}", list.name()),
                ),
                Err(why_not) => Check::warning(
                    NAME,
                    format!(
                        "{runtime}, whose {}: {why_not}",
                        if matches!(why_not, WhyNot::Labels) {
                            "labels are not read"
                        } else {
                            "functions have no names"
                        }
                    ),
                    "docs/languages.md lists what the agent can read; the native frames are there",
                ),
            }
        }
    }
}

/// The list from which the names of functions come, if they come from one, or why functions have no names.
type Names = Result<Option<CodeList>, WhyNot>;

/// Finds the interpreter of a process, and where it lists the names of its code, if they are to come from there; or why functions
/// have no names.
fn inspect_names(pid: u32) -> io::Result<Option<(RuntimeFile, Names)>> {
    let Some((file, attached)) = inspect(pid)? else { return Ok(None) };
    let names = match attached {
        Ok(Attachment::Listed(reason)) => {
            let key = ProcessKey::of_running(pid).map_err(io::Error::other)?;
            let list = if reason.may_pass() { CodeList::of_live(key) } else { None };
            list.map(Some).ok_or(reason)
        }
        Ok(_) => Ok(None),
        Err(reason) => Err(reason),
    };
    Ok(Some((file, names)))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, BufReader},
        process::{Child, Command, Stdio, id},
    };

    use super::*;
    use crate::commands::check::CheckState;

    struct Running(Child);

    impl Drop for Running {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn the_interpreter_of_a_process_is_checked() {
        let script = "print('ready', flush=True)\nimport time\ntime.sleep(100)";
        let mut python = Running(
            Command::new("/usr/bin/python3").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap(),
        );
        let mut ready = String::new();
        BufReader::new(python.0.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        let pid = python.0.id();
        let found = interpreter(pid);
        assert_eq!(found.state, CheckState::Ok, "{found:?}");
        assert!(found.seen.starts_with(&format!("process {pid} runs python 3.")), "{found:?}");
        let script = "$| = 1; print qq(ready\\n); sleep 100";
        let perl = Command::new("perl").args(["-e", script]).stdout(Stdio::piped()).spawn();
        let mut perl = Running(perl.unwrap());
        ready.clear();
        BufReader::new(perl.0.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        let nameless = interpreter(perl.0.id());
        assert_eq!((nameless.state, ready.as_str()), (CheckState::Warning, "ready\n"));
        assert!(nameless.seen.contains("runs perl 5."), "{nameless:?}");
        let why = "whose functions have no names: the agent shows the C functions of the interpreter alone";
        assert!(nameless.seen.ends_with(why), "{nameless:?}");
        let native = interpreter(id());
        assert!(native.seen.contains("no interpreter"), "{native:?}");
        drop(python);
        let gone = interpreter(pid);
        assert_eq!(gone.state, CheckState::Warning, "{gone:?}");
        assert!(gone.seen.contains("No such file"), "{gone:?}");
    }
}
