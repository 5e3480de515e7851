//! Running programs, stopped for a moment to copy their registers and stacks.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use gannet_elf::Arch;
use gannet_unwind::build::{BuildOptions, BuiltTable, build_bytes, build_file};
use gannet_unwind::limits::TableLimits;
use gannet_unwind::table::UnwindTable;
use gannet_unwind::unwind::{TableSource, ThreadSnapshot, UnwoundStack, unwind_stack};

/// One executable mapping.
#[derive(Clone, Debug)]
pub struct Mapping {
    pub start: u64,
    pub end: u64,
    pub offset: u64,
    pub path: String,
}

/// A stopped thread.
#[derive(Debug)]
pub struct Thread {
    pub pc: u64,
    pub registers: [u64; 16],
    pub stack: Vec<u8>,
}

/// A process at one moment.
#[derive(Debug)]
pub struct Process {
    pub mappings: Vec<Mapping>,
    pub threads: Vec<Thread>,
    pub vdso: Vec<u8>,
}

/// A child that dies with its handle.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        // A shell's pipeline would run on without its shell.
        let group = -(self.0.id().cast_signed());
        // SAFETY: takes no pointers; the group was made for this child by `start`.
        let _ = unsafe { libc::kill(group, libc::SIGKILL) };
        let _ = self.0.wait();
    }
}

pub fn start(command: &mut Command) -> Running {
    let child = std::os::unix::process::CommandExt::process_group(command, 0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    Running(child.unwrap_or_else(|error| panic!("{command:?}: {error}")))
}

/// All processes below one, itself included.
pub fn family(root: u32) -> Vec<u32> {
    let mut all = vec![root];
    let mut at = 0;
    while at < all.len() {
        let children =
            fs::read_to_string(format!("/proc/{0}/task/{0}/children", all[at])).unwrap_or_default();
        all.extend(children.split_whitespace().map(|pid| pid.parse::<u32>().unwrap()));
        at += 1;
    }
    all
}

fn trace(request: libc::c_uint, tid: i32, data: *mut libc::c_void) -> bool {
    // SAFETY: the requests used here read nothing from us, and write at most one `user_regs_struct` to `data`, which
    // the caller of PTRACE_GETREGS provides.
    unsafe { libc::ptrace(request, tid, std::ptr::null_mut::<libc::c_void>(), data) == 0 }
}

/// Stops one thread.
fn stop(tid: i32) -> bool {
    let mut status = 0;
    trace(libc::PTRACE_SEIZE, tid, std::ptr::null_mut())
        && trace(libc::PTRACE_INTERRUPT, tid, std::ptr::null_mut())
        // SAFETY: `status` is valid for writes.
        && unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) == tid && libc::WIFSTOPPED(status) }
}

/// The threads of a process, stopped until this is dropped.
struct Stopped {
    tids: Vec<i32>,
}

impl Stopped {
    /// All of them: those that have not been stopped yet may start others.
    fn all(pid: u32) -> Option<Self> {
        let mut stopped = Self { tids: Vec::new() };
        let mut seen = HashSet::new();
        loop {
            let before = seen.len();
            for task in fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
                let tid = task.file_name().to_str()?.parse().ok()?;
                if seen.insert(tid) && stop(tid) {
                    stopped.tids.push(tid);
                }
            }
            if seen.len() == before {
                return Some(stopped);
            }
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for tid in &self.tids {
            trace(libc::PTRACE_DETACH, *tid, std::ptr::null_mut());
        }
    }
}

/// Stops all threads of a process, copies their registers and stacks, and lets them continue. All stop before the first copy, so
/// that the mappings are the same for each of them.
pub fn capture(pid: u32) -> Option<Process> {
    let memory = File::open(format!("/proc/{pid}/mem")).ok()?;
    let stopped = Stopped::all(pid)?;
    let mut threads = Vec::new();
    for tid in &stopped.tids {
        // SAFETY: all-zero bytes are a valid `user_regs_struct`, which is integers only.
        let mut r: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        if trace(libc::PTRACE_GETREGS, *tid, (&raw mut r).cast()) {
            let registers = [
                r.rax, r.rdx, r.rcx, r.rbx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11, r.r12,
                r.r13, r.r14, r.r15,
            ];
            let mut stack = vec![0; 1 << 20];
            let read = memory.read_at(&mut stack, r.rsp).unwrap_or(0);
            stack.truncate(read);
            threads.push(Thread { pc: r.rip, registers, stack });
        }
    }
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let mut mappings = Vec::new();
    let mut vdso = Vec::new();
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (range, permissions, offset) = (words.next()?, words.next()?, words.next()?);
        let (start, end) = range.split_once('-')?;
        let path = words.nth(2).unwrap_or_default().to_owned();
        let mapping = Mapping {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            offset: u64::from_str_radix(offset, 16).ok()?,
            path,
        };
        if mapping.path == "[vdso]" {
            vdso = vec![0; (mapping.end - mapping.start) as usize];
            let read = memory.read_at(&mut vdso, mapping.start).unwrap_or(0);
            vdso.truncate(read);
        }
        if permissions.contains('x') {
            mappings.push(mapping);
        }
    }
    // Not before the vDSO is read: a process that ends or calls execve has none any more.
    drop(stopped);
    Some(Process { mappings, threads, vdso })
}

/// Tables of files, each built once.
#[derive(Default)]
pub struct Files(HashMap<String, Option<Rc<BuiltTable>>>);

impl Files {
    pub fn built(&mut self, mapping: &Mapping, vdso: &[u8]) -> Option<Rc<BuiltTable>> {
        let path = &mapping.path;
        self.0
            .entry(path.clone())
            .or_insert_with(|| {
                let limits = TableLimits { time: None, ..TableLimits::default() };
                // With runs, which is the harder form; another test compares it with the form without runs.
                let options = BuildOptions { runs: true, ..BuildOptions::new(path, &limits) };
                let built = if path == "[vdso]" {
                    build_bytes(vdso, &options)
                } else {
                    build_file(&File::open(path).ok()?, &options)
                };
                match built {
                    Ok(built) => Some(Rc::new(built)),
                    Err(error) => panic!("{error}"),
                }
            })
            .clone()
    }
}

/// The tables of one process.
pub struct Tables(Vec<(Mapping, Rc<BuiltTable>, u64)>);

impl Tables {
    pub fn of(process: &Process, files: &mut Files) -> Self {
        let found = process.mappings.iter().filter_map(|mapping| {
            let built = files.built(mapping, &process.vdso)?;
            let bias = built.segments.bias(mapping.start, mapping.offset, 4096)?;
            Some((mapping.clone(), built, bias))
        });
        Self(found.collect())
    }

    pub fn iter(&self) -> impl Iterator<Item = &(Mapping, Rc<BuiltTable>, u64)> {
        self.0.iter()
    }
}

impl TableSource for Tables {
    fn find(&self, address: u64) -> Option<(&UnwindTable, u64)> {
        let (_, built, bias) = self.0.iter().find(|(m, _, _)| m.start <= address && address < m.end)?;
        Some((&built.table, *bias))
    }
}

impl Thread {
    pub fn unwind(&self, tables: &Tables) -> UnwoundStack {
        let snapshot = ThreadSnapshot {
            arch: Arch::X86_64,
            pc: self.pc,
            registers: &self.registers,
            stack_start: self.registers[7],
            stack: &self.stack,
            unread: &[],
        };
        unwind_stack(&snapshot, tables, 1024)
    }
}

/// Names of functions by address, from a file's own symbol table.
pub struct Symbols(Vec<(u64, u64, String)>);

impl Symbols {
    pub fn of(path: &Path) -> Self {
        use object::{Object, ObjectSymbol};
        let bytes = fs::read(path).unwrap();
        let file = object::File::parse(&*bytes).unwrap();
        let mut all: Vec<_> = file
            .symbols()
            .filter(|symbol| symbol.kind() == object::SymbolKind::Text && symbol.size() > 0)
            .map(|symbol| (symbol.address(), symbol.size(), symbol.name().unwrap_or_default().to_owned()))
            .collect();
        all.sort();
        Self(all)
    }

    pub fn name(&self, vaddr: u64) -> Option<&str> {
        let after = self.0.partition_point(|(start, _, _)| *start <= vaddr);
        let (start, size, name) = self.0.get(after.checked_sub(1)?)?;
        (vaddr < start + size).then_some(name.as_str())
    }
}

/// Runs a compiler; fails the test with its messages.
pub fn compile(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?} cannot be run: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Repeats an attempt until it succeeds, at most for 20 s.
pub fn until<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = attempt() {
            return found;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "no attempt succeeded within 20 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn which(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|file| file.is_file())
}
