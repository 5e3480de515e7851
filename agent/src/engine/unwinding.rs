//! Unwinding by tables: which images the BPF programs can unwind, and the raw samples that wait for it.
//!
//! The mappings of an image are written into the kernel once all its waiting samples are unwound: from then on the BPF
//! programs unwind its stacks. They are written again when its mappings change. An image of which a thread blocked is written
//! as soon as all its tables are made: off-CPU stacks never come raw, so that no sample of theirs can wait.

use std::{collections::HashSet, mem, sync::Arc, time::Instant};

use gannet_unwind::overrides::Overrides;

use super::{
    backlog::{Backlog, Resolved, Unwinder},
    interpreters::Interpreters,
};
use crate::{
    kernel::Kernel,
    model::{FunctionCopy, Image, ImageKey, MappedFile, Sample, StackEnd, StackWord},
    process::{Process, ProcessTable},
    rules::RuleBook,
    runtimes::{CodeNeeds, Interpreter},
    tables::{UnwindTables, UnwoundSample},
};

pub(super) struct Unwinding {
    /// `None`: stacks are unwound by frame pointers only.
    tables: Option<UnwindTables>,
    backlog: Backlog,
    /// Images whose mappings have changed.
    changed: HashSet<ImageKey>,
    /// Images of which a thread blocked before the BPF programs could unwind its stack.
    blocked: HashSet<ImageKey>,
    /// Images that are in the kernel while the file of their runtime is not read.
    unread: HashSet<ImageKey>,
    /// `None` without tables: list frames stand between native ones.
    interpreters: Option<Interpreters>,
}

impl Unwinding {
    pub(super) fn new(tables: Option<UnwindTables>, interpreters: Option<Interpreters>) -> Self {
        Self {
            tables,
            backlog: Backlog::default(),
            changed: HashSet::new(),
            blocked: HashSet::new(),
            unread: HashSet::new(),
            interpreters,
        }
    }

    /// The unwind tables; `None` if stacks are unwound by frame pointers only.
    pub(super) fn tables(&self) -> Option<&UnwindTables> {
        self.tables.as_ref()
    }

    /// The interpreters; `None` without tables.
    pub(super) fn interpreters(&self) -> Option<&Interpreters> {
        self.interpreters.as_ref()
    }

    /// Forgets interpreters of processes that have ended.
    pub(super) fn next_window(&mut self, processes: &ProcessTable) {
        if let Some(interpreters) = &mut self.interpreters {
            interpreters.next_window(processes);
        }
    }

    pub(super) fn backlog(&self) -> &Backlog {
        &self.backlog
    }

    /// Takes a raw sample.
    pub(super) fn push(&mut self, sample: Sample) {
        self.backlog.push(sample, Instant::now());
    }

    /// The mappings of these images have changed.
    pub(super) fn add_changed(&mut self, keys: impl IntoIterator<Item = ImageKey>) {
        self.changed.extend(keys);
    }

    /// Other files take the place of some of an image's: the samples that wait were taken of the `former` ones.
    pub(super) fn replace_image(&mut self, key: &ImageKey, former: &Arc<Image>) {
        self.backlog.replace_image(key, former);
    }

    /// A rule that wants off-CPU time selects this image.
    pub(super) fn add_blocked(&mut self, key: ImageKey) {
        self.blocked.insert(key);
    }

    /// A thread has returned to a CPU, with this stack.
    pub(super) fn add_off_cpu(&mut self, sample: &Sample) {
        let key = ImageKey::of(&sample.subject);
        let is_in_kernel = self.tables.as_ref().is_none_or(|tables| tables.is_loaded(&key));
        if !is_in_kernel || sample.raw.is_none() && sample.end == StackEnd::Broken {
            self.blocked.insert(key);
        }
    }

    /// Unwinds the raw samples whose tables are made, and writes images into the kernel. With `force` unwinds all samples, by
    /// the tables that there are. Returns what the caller has to add to the window, in order.
    pub(super) fn resolve(
        &mut self,
        kernel: &mut Kernel,
        processes: &mut ProcessTable,
        rules: &RuleBook,
        force: bool,
    ) -> Vec<Resolved> {
        let Some(tables) = &mut self.tables else { return Vec::new() };
        tables.collect();
        let mut interpreters = self.interpreters.as_mut();
        if let Some(interpreters) = &mut interpreters {
            self.changed.extend(interpreters.collect(kernel, processes));
        }
        for key in mem::take(&mut self.changed) {
            let Some(process) = live(processes, &key).filter(|_| tables.is_loaded(&key)) else { continue };
            if rules.slots().wants_off_cpu_of(process.rules) && !tables.request_all(&process.image) {
                self.changed.insert(key);
            } else {
                write(tables, kernel, process, interpreters.as_deref_mut(), &mut self.unread);
            }
        }
        let mut unwinder = CodeUnwinder { tables, interpreters: interpreters.as_deref_mut() };
        let mut resolved = self.backlog.resolve(&mut unwinder, processes, Instant::now(), force);
        for resolved in &mut resolved {
            match resolved {
                Resolved::Done(key) => {
                    if let Some(process) = live(processes, key) {
                        write(tables, kernel, process, interpreters.as_deref_mut(), &mut self.unread);
                    }
                }
                Resolved::Changes(changes) => self.changed.extend(&changes.changed),
                Resolved::Sample { sample, former } => {
                    if let Some(interpreters) = &mut interpreters {
                        enter(tables, interpreters, sample, former.as_ref(), processes);
                    }
                }
            }
        }
        for key in mem::take(&mut self.blocked) {
            match live(processes, &key).filter(|process| !process.kernel_thread) {
                Some(process) if tables.request_all(&process.image) => {
                    write(tables, kernel, process, interpreters.as_deref_mut(), &mut self.unread);
                }
                Some(_) => drop(self.blocked.insert(key)),
                None => {}
            }
        }
        for key in mem::take(&mut self.unread) {
            match live(processes, &key) {
                Some(process) if tables.request_listed(&process.image) => {
                    write(tables, kernel, process, interpreters.as_deref_mut(), &mut self.unread);
                }
                Some(_) => drop(self.unread.insert(key)),
                None => {}
            }
        }
        resolved
    }

    /// Replaces the tables that the operator supplies.
    pub(super) fn supply(&mut self, kernel: &mut Kernel, supplied: Arc<Overrides>) {
        if let Some(tables) = &mut self.tables {
            tables.supply(kernel, supplied);
        }
    }

    /// Enters the functions of a sample's list frames.
    pub(super) fn enter_functions(&mut self, sample: &mut Sample, processes: &mut ProcessTable) {
        if let (Some(tables), Some(interpreters)) = (&self.tables, &mut self.interpreters) {
            enter(tables, interpreters, sample, None, processes);
        }
    }

    /// Takes copies of the texts of a function.
    pub(super) fn add_copy(&mut self, key: ImageKey, copy: FunctionCopy, processes: &ProcessTable) {
        if let Some(interpreters) = &mut self.interpreters {
            interpreters.add_copy(key, copy, processes);
        }
    }

    /// Takes the mappings of a process out of the kernel.
    pub(super) fn remove(&mut self, kernel: &mut Kernel, tgid: u32) {
        if let Some(tables) = &mut self.tables {
            tables.unload(kernel, tgid);
        }
        kernel.remove_list_frames(tgid);
        kernel.remove_label_source(tgid);
        kernel.remove_thread_context(tgid);
    }
}

fn live<'a>(processes: &'a ProcessTable, key: &ImageKey) -> Option<&'a Process> {
    processes.get(key).filter(|process| process.is_alive())
}

/// Enters the functions of a sample's list frames. The sample was taken of the image `former`, if there is one.
fn enter(
    tables: &UnwindTables,
    interpreters: &mut Interpreters,
    sample: &mut Sample,
    former: Option<&Arc<Image>>,
    processes: &mut ProcessTable,
) {
    if sample.user.iter().all(|word| StackWord::is_address(*word)) {
        return;
    }
    let now = processes.get(&ImageKey::of(&sample.subject)).map(|process| Arc::clone(&process.image));
    let image = former.or(now.as_ref());
    interpreters.enter(sample, processes, image.and_then(|image| tables.runtime_of(image)));
}

/// Unwinds by tables, and through code that runtimes make.
struct CodeUnwinder<'a> {
    tables: &'a mut UnwindTables,
    interpreters: Option<&'a mut Interpreters>,
}

impl Unwinder for CodeUnwinder<'_> {
    fn unwind(&self, image: &Image, interpreter: Option<&Interpreter>, sample: &Sample) -> UnwoundSample {
        self.tables.unwind(image, interpreter, sample)
    }

    fn read_code(
        &mut self,
        key: &ImageKey,
        image: &Image,
        interpreter: Option<&Arc<Interpreter>>,
        needs: CodeNeeds,
    ) -> bool {
        let Some(interpreters) = &mut self.interpreters else { return false };
        if let Some(interpreter) = interpreter {
            return interpreters.read_code(*key, interpreter, needs);
        }
        if let Some((file, bias)) = self.tables.runtime_of(image) {
            interpreters.found(*key, Arc::clone(file), bias);
        }
        interpreters.is_pending(key)
    }

    fn request(&mut self, file: &Arc<MappedFile>, samples: usize) {
        self.tables.request(file, samples);
    }
}

/// Writes an image into the kernel. Adds it to `unread` if its runtime's file is not read yet: then it has to be written again.
fn write(
    tables: &mut UnwindTables,
    kernel: &mut Kernel,
    process: &Process,
    interpreters: Option<&mut Interpreters>,
    unread: &mut HashSet<ImageKey>,
) {
    let is_refused = interpreters.as_ref().is_none_or(|interpreters| interpreters.is_refused(&process.key));
    let sends_code = !is_refused && tables.has_code_file(&process.image);
    // A process that does not fit is unwound in user space. The tables log that.
    let _ = tables.load_with(kernel, process.key, &process.image, sends_code);
    if let (Some(interpreters), Some((file, bias))) = (interpreters, tables.runtime_of(&process.image)) {
        interpreters.found(process.key, Arc::clone(file), bias);
    }
    if !tables.request_listed(&process.image) {
        unread.insert(process.key);
    }
}
