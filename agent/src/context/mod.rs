//! The facts that programs give about themselves: their service, and the span of a trace in which each thread works.
//!
//! A process gives its service in a memory region that its OpenTelemetry SDK publishes ([`published`]), or in two variables of
//! its environment ([`environment`]). [`service`] has the order. The region also says whether threads publish their spans;
//! [`thread`] finds where. All of it belongs to the process, which may forge it: the agent bounds each read, and leaves out an
//! implausible fact with a reason.

mod environment;
mod maps;
mod published;
mod service;
mod thread;

use std::{io, sync::Arc};

use self::thread::ThreadFinder;
pub(crate) use self::{
    environment::Environment,
    published::{ContextFault, Published},
    thread::ThreadFault,
};
use crate::{
    model::{ProcessKey, Service, ThreadContext},
    process::{ProcError, check_identity, read_variables},
    runtimes::ProcessMemory,
};

/// The attributes of a resource that name a service.
const KEYS: [&str; 3] = ["service.name", "service.namespace", "service.version"];

/// The facts that a process gives.
#[derive(Clone, Debug, Default)]
pub(crate) struct ProcessFacts {
    /// Names and version of its service, as far as the process gives them.
    pub(crate) service: Arc<Service>,
    /// Its published context, or why that cannot be read; `None` without one.
    pub(crate) published: Option<Result<Arc<Published>, ContextFault>>,
    /// The place where its threads keep their spans, or why that is not known; `None` if they publish none.
    pub(crate) thread: Option<Result<ThreadContext, ThreadFault>>,
}

/// The parts of a process that the agent reads.
#[derive(Clone, Debug)]
pub(crate) enum Depth {
    /// The environment: all that a process which has just begun can have.
    Environment,
    /// The environment, and the facts that it publishes.
    All,
    /// The facts that it publishes, if that has changed since. The environment is known.
    Changes(Arc<Published>),
}

/// Reads the facts of processes, and remembers the files that it has searched for thread-local variables.
#[derive(Debug, Default)]
pub(crate) struct ContextReader {
    files: ThreadFinder,
}

impl ContextReader {
    /// Reads a process. `known` are the facts of an earlier reading, if there was one. The calls may wait for the process and for
    /// its file systems without end. `Ok(None)`: nothing has changed.
    pub(crate) fn read(
        &self,
        key: ProcessKey,
        depth: &Depth,
        known: Option<&Environment>,
    ) -> Result<Option<(ProcessFacts, Environment)>, ProcError> {
        let tgid = key.tgid;
        let memory = ProcessMemory { tgid };
        if let Depth::Changes(before) = depth
            && published::is_unchanged(&memory, before)
        {
            check_identity(key)?;
            return Ok(None);
        }
        let environment = match known {
            Some(known) => known.clone(),
            None => Environment::of(&read_variables(key, &environment::NAMES)?),
        };
        let mut facts = ProcessFacts::default();
        if !matches!(depth, Depth::Environment) {
            let read = |source: io::Error| ProcError::Read { tgid, file: "maps", source };
            let maps = maps::read(tgid).map_err(read)?;
            facts.published = published::find(&memory, &maps.contexts).map(|found| found.map(Arc::new));
            if let Some(Ok(context)) = &facts.published
                && context.has_spans()
            {
                facts.thread = Some(self.files.find(tgid, &maps, &memory));
            }
        }
        let context = facts.published.as_ref().and_then(|found| found.as_ref().ok());
        facts.service = Arc::new(service::choose(context.map(|context| &**context), &environment));
        // The PID may belong to another process by now.
        check_identity(key)?;
        Ok(Some((facts, environment)))
    }
}

/// Reads all facts of one process. The calls may wait without end.
pub(crate) fn read(key: ProcessKey) -> Result<ProcessFacts, ProcError> {
    let read = ContextReader::default().read(key, &Depth::All, None)?;
    Ok(read.map(|(facts, _)| facts).unwrap_or_default())
}

impl ProcessFacts {
    /// Describes what the process publishes for its threads, and why something is missing; human-readable. Empty without either.
    pub(crate) fn text(&self) -> String {
        let mut parts = Vec::new();
        if let Some(Err(fault)) = &self.published {
            parts.push(format!("its process context is not read: {fault}"));
        }
        match &self.thread {
            Some(Ok(_)) => parts.push("its samples carry spans".to_owned()),
            Some(Err(fault)) => parts.push(format!("its samples carry no spans: {fault}")),
            None => {}
        }
        parts.join("; ")
    }

    /// Reports whether something that the process publishes is not read.
    pub(crate) fn has_fault(&self) -> bool {
        matches!(self.published, Some(Err(_))) || matches!(self.thread, Some(Err(_)))
    }

    /// Does the same as [`ProcessFacts::text`], with the service.
    pub(crate) fn all_text(&self) -> String {
        let (service, text) = (self.service.text(), self.text());
        [service, text].into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join("; ")
    }
}
