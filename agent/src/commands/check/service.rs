//! Check of one process: the service that it names, and whether its samples carry spans.

use super::Check;
use crate::{
    access::{self, Target},
    context,
    model::ProcessKey,
};

const NAME: &str = "service";

pub(super) fn service(pid: u32) -> Check {
    let read = move || ProcessKey::of_running(pid).map(context::read);
    let facts = match access::node().compute(Target::Process(pid), "its service", read) {
        Err(unanswered) => {
            return Check::warning(
                NAME,
                unanswered.to_string(),
                "wait until its memory and its files answer",
            );
        }
        Ok(Err(error) | Ok(Err(error))) => {
            return Check::warning(
                NAME,
                format!("cannot read process {pid}: {error}"),
                "give the id of a running process, and run as root",
            );
        }
        Ok(Ok(Ok(facts))) => facts,
    };
    let seen = match facts.all_text() {
        text if text.is_empty() => {
            format!(
                "process {pid} names no service: its profiles have the name of its pod, workload or executable"
            )
        }
        text => format!("process {pid}: {text}"),
    };
    if facts.has_fault() {
        Check::warning(NAME, seen, "docs/tracing.md lists the forms that the agent can read")
    } else {
        Check::ok(NAME, seen)
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, id};

    use super::*;
    use crate::commands::check::CheckState;

    #[test]
    fn the_service_of_a_process_is_shown_with_its_source() {
        let mut sleep = Command::new("sleep")
            .arg("100")
            .env("OTEL_SERVICE_NAME", "shop")
            .env("OTEL_RESOURCE_ATTRIBUTES", "service.version=1%2E2,team=x")
            .spawn()
            .unwrap();
        let found = service(sleep.id());
        sleep.kill().unwrap();
        sleep.wait().unwrap();
        assert_eq!(found.state, CheckState::Ok, "{found:?}");
        let expected =
            "service.name shop from OTEL_SERVICE_NAME, service.version 1.2 from OTEL_RESOURCE_ATTRIBUTES";
        assert!(found.seen.ends_with(expected), "{found:?}");
        assert_eq!(service(sleep.id()).state, CheckState::Warning, "it has ended");
        assert!(service(id()).seen.contains("names no service"));
    }
}
