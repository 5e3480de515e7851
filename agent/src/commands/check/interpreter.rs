//! Check of one process: whether the names of its interpreted functions can be read.

use super::Check;
use crate::{
    access::{self, Target},
    runtimes::inspect,
};

const NAME: &str = "interpreter";

pub(super) fn interpreter(pid: u32) -> Check {
    let inspected = access::node().compute(Target::Process(pid), "its interpreter", move || inspect(pid));
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
        Ok(Ok(Some((file, why_not)))) => {
            let runtime =
                format!("process {pid} runs {} {}", file.runtime.name(), file.detected.version_text);
            match why_not {
                None => Check::ok(NAME, runtime),
                Some(why_not) => Check::warning(
                    NAME,
                    format!(
                        "{runtime}, whose {}: {why_not}",
                        if file.runtime.has_frames() {
                            "functions have no names"
                        } else {
                            "labels are not read"
                        }
                    ),
                    "docs/languages.md lists what the agent can read; the native frames are there",
                ),
            }
        }
    }
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
        let native = interpreter(id());
        assert!(native.seen.contains("no interpreter"), "{native:?}");
        drop(python);
        let gone = interpreter(pid);
        assert_eq!(gone.state, CheckState::Warning, "{gone:?}");
        assert!(gone.seen.contains("No such file"), "{gone:?}");
    }
}
