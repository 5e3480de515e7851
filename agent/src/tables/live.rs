//! Stacks of a running Java program, stopped between any two instructions. It prints its own stacks, and each stack that is
//! unwound must be one of them. Needs `java` and `javac`.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::{BufRead as _, BufReader},
    mem,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use super::{tests::Fake, *};
use crate::{
    model::{
        ProcessKey, RawUserStack, Sample, SampleKind, StackEnd, StackMarks, StackWord, Subject, boot_time_ns,
    },
    runtimes::{Attachment, GeneratedCode, Interpreter, Memory as _, ProcessMemory},
};

const STACK_BYTES: usize = 24 << 10;
/// Instructions that are stepped over one by one after each stop.
const STEPS: usize = 60;
const STOPS: usize = 150;
/// How long a thread may take to stop, and until a step is taken for a wait.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
const BLOCKED_TIMEOUT: Duration = Duration::from_millis(200);

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A traced thread of a program. The program has not ended before its tracer has seen the end of the thread.
struct Traced {
    pid: u32,
    tid: u32,
}

impl Drop for Traced {
    fn drop(&mut self) {
        let mut status = 0;
        // SAFETY: the program is a child that no one has waited for; `waitpid` writes one integer.
        unsafe {
            libc::kill(self.pid as libc::pid_t, libc::SIGKILL);
            while libc::waitpid(self.tid as libc::pid_t, &raw mut status, libc::__WALL) >= 0
                && libc::WIFSTOPPED(status)
            {}
        }
    }
}

/// Makes a request to a thread that is traced, or is to be.
fn ptrace(request: libc::c_uint, tid: u32, data: usize) {
    // SAFETY: `data` is a number, or the address of a buffer that is large enough.
    let result = unsafe { libc::ptrace(request, tid as libc::pid_t, 0_usize, data) };
    assert!(result >= 0, "{request:#x}: {}", std::io::Error::last_os_error());
}

/// Waits until a thread stops. Returns the signal that it is to get when it goes on; 0 for none.
fn wait_for(pid: u32, tid: u32) -> usize {
    let begun = Instant::now();
    let mut is_interrupted = false;
    loop {
        let mut status = 0;
        // SAFETY: writes one integer.
        let waited =
            unsafe { libc::waitpid(tid as libc::pid_t, &raw mut status, libc::__WALL | libc::WNOHANG) };
        if waited == tid as libc::pid_t {
            assert!(libc::WIFSTOPPED(status), "the thread has ended: {status:#x}");
            let signal = libc::WSTOPSIG(status);
            let is_of_ptrace = status >> 16 != 0 || signal == libc::SIGTRAP;
            return if is_of_ptrace { 0 } else { signal as usize };
        }
        assert!(waited == 0, "cannot wait: {}", std::io::Error::last_os_error());
        let state = || fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat"));
        assert!(begun.elapsed() < STOP_TIMEOUT, "it does not stop: {:?}", state());
        if begun.elapsed() > BLOCKED_TIMEOUT && !is_interrupted {
            // A step into a system call ends with it.
            ptrace(libc::PTRACE_INTERRUPT, tid, 0);
            is_interrupted = true;
        }
        thread::yield_now();
    }
}

/// Takes a sample of a stopped thread.
fn sample(pid: u32, tid: u32) -> Sample {
    // SAFETY: plain integers.
    let mut regs: libc::user_regs_struct = unsafe { mem::zeroed() };
    ptrace(libc::PTRACE_GETREGS, tid, &raw mut regs as usize);
    let registers = [
        regs.rax, regs.rdx, regs.rcx, regs.rbx, regs.rsi, regs.rdi, regs.rbp, regs.rsp, regs.r8, regs.r9,
        regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    let memory = ProcessMemory { tgid: pid };
    let mut stack = vec![0; STACK_BYTES];
    let mut length = STACK_BYTES;
    while length > 0 && !memory.read(regs.rsp, &mut stack[..length]) {
        length -= 512;
    }
    stack.truncate(length);
    Sample {
        subject: Subject {
            key: ProcessKey { tgid: pid, start_boottime_ns: 1 },
            exec_id: 1,
            ktime_ns: boot_time_ns(),
            cgroup_id: 0,
            comm: String::new(),
            rules: 1,
            candidates: 0,
        },
        tid,
        kind: SampleKind::OnCpu,
        value_ns: 1,
        kernel: Vec::new(),
        user: Vec::new(),
        end: StackEnd::None,
        end_code: 0,
        marks: StackMarks::default(),
        state: 0,
        labels: None,
        raw: Some(Box::new(RawUserStack {
            pc: regs.rip,
            registers: registers.to_vec(),
            stack,
            unread: Vec::new(),
            lists: None,
            live_until_ns: 0,
        })),
        list_layout: 0,
    }
}

fn image(pid: u32) -> Image {
    let mut files: HashMap<String, Arc<MappedFile>> = HashMap::new();
    let mut image = Image::default();
    for line in fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines() {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        if !fields[1].contains('x') {
            continue;
        }
        let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
        let (start, end) = fields[0].split_once('-').unwrap();
        let kind = match fields.get(5).copied() {
            Some("[vdso]") => MappingKind::Vdso,
            Some(path) if path.starts_with('/') => {
                let open = || Arc::new(MappedFile::opened(path, 1, 1, fs::File::open(path).unwrap()));
                MappingKind::File(Arc::clone(files.entry(path.to_owned()).or_insert_with(open)))
            }
            _ => MappingKind::Anon,
        };
        image.map(Mapping { start: hex(start), end: hex(end), offset: hex(fields[2]), kind });
    }
    image
}

/// Unwinds, and reads what that needs until nothing is missing.
fn unwind(
    tables: &mut UnwindTables,
    image: &Image,
    interpreter: &Interpreter,
    sample: &Sample,
) -> UnwoundSample {
    let memory = ProcessMemory { tgid: sample.subject.key.tgid };
    for _ in 0..400 {
        let unwound = tables.unwind(image, Some(interpreter), sample);
        if let Some(file) = &unwound.missing {
            tables.request(file, 1);
            thread::sleep(Duration::from_millis(50));
            tables.collect();
        } else if unwound.needs.is_empty() {
            return unwound;
        } else {
            interpreter.code.as_ref().unwrap().read(&unwound.needs, interpreter, &memory).unwrap();
        }
    }
    panic!("no end");
}

/// Returns the frames of Java methods, `CLASS.METHOD LINE` each, and of other code.
fn names(image: &Image, interpreter: &Interpreter, unwound: &UnwoundSample) -> Vec<String> {
    let mut names = Vec::new();
    for word in &unwound.frames {
        match StackWord::decode(*word) {
            StackWord::Address(address) => {
                let kind = image.find(address.saturating_sub(1)).map(|mapping| mapping.kind.clone());
                names.push(match kind {
                    Some(MappingKind::File(file)) => format!("[{}]", file.path.rsplit('/').next().unwrap()),
                    Some(MappingKind::Vdso) => "[vdso]".to_owned(),
                    Some(MappingKind::Anon) => format!("[anon {address:#x}]"),
                    None => format!("[none {address:#x}]"),
                });
            }
            StackWord::Function(number) => names.push(number.to_string()),
            StackWord::Position { position, .. } => {
                let number: u64 = names.pop().unwrap().parse().unwrap();
                let function = interpreter.function(number).unwrap();
                let text = function.text.get().unwrap();
                names.push(match text {
                    Ok(text) => format!("{} {}", text.name, interpreter.line(text, position)),
                    Err(reason) => format!("[{reason}]"),
                });
            }
        }
    }
    names
}

/// A Java program that spins, and the stacks that it has printed by the name of their case, the leaf first.
struct Spinning {
    running: Running,
    printed: BTreeMap<String, Vec<String>>,
}

/// Starts the Java program with these flags, and waits until it spins.
fn spin(flags: &[&str], rounds: u32, directory: &Path) -> Spinning {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/Spin.java");
    let compiled = Command::new("javac").args(["--release", "11", "-d"]).arg(directory).arg(program).status();
    assert!(compiled.unwrap().success());
    let java = std::env::var("GANNET_TEST_JAVA").unwrap_or_else(|_| "java".to_owned());
    let child = Command::new(&java)
        .args(flags)
        .arg("-cp")
        .arg(directory)
        .args(["Spin", &rounds.to_string()])
        .stdout(Stdio::piped())
        .spawn();
    let mut running = Running(child.unwrap());
    let mut lines = BufReader::new(running.0.stdout.take().unwrap()).lines();
    let mut printed = BTreeMap::new();
    loop {
        let line = lines.next().unwrap().unwrap();
        if line == "ready" {
            return Spinning { running, printed };
        }
        // The first line is the number of cases.
        let Some((case, frames)) = line.split_once(';') else { continue };
        let frames = frames.split(';').filter(|frame| !is_hidden(frame)).map(str::to_owned);
        printed.insert(case.to_owned(), frames.collect());
    }
}

/// Reports whether only some versions print this frame.
fn is_hidden(frame: &str) -> bool {
    frame.contains("$$Lambda") || frame.contains("LambdaForm")
}

fn check(flags: &[&str], rounds: u32) {
    let directory = tempfile::tempdir().unwrap();
    let Spinning { running, printed } = spin(flags, rounds, directory.path());
    let pid = running.0.id();
    let (file, bias) = crate::runtimes::find(pid).unwrap().unwrap();
    assert_eq!(file.runtime.name(), "java");
    let begun = Instant::now();
    let attached = file.runtime.attach(&file, bias, &ProcessMemory { tgid: pid }).unwrap();
    eprintln!("attached to {} in {:?}", file.detected.version_text, begun.elapsed());
    let Attachment::Code(reader) = attached else { panic!("{attached:?}") };
    let interpreter = Interpreter::new(Arc::new(file), bias).with_code(GeneratedCode::new(reader));
    let mut tables = UnwindTables::new(&Fake::new(0), TableSources::default(), || {}).unwrap();
    // The launcher runs `main` in the second thread.
    let mut tids: Vec<u32> = fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect();
    tids.sort_unstable();
    let main = tids[1];
    let image = image(pid);
    ptrace(libc::PTRACE_SEIZE, main, 0);
    let _traced = Traced { pid, tid: main };
    let (mut all, mut good, mut whole, mut samples) = (0, 0, 0, 0);
    let mut odd: BTreeMap<String, (u32, u64)> = BTreeMap::new();
    let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
    let first: u32 = printed["plain"][0].rsplit(' ').next().unwrap().parse().unwrap();
    let mut time = Duration::ZERO;
    for _ in 0..STOPS {
        ptrace(libc::PTRACE_INTERRUPT, main, 0);
        let mut signal = wait_for(pid, main);
        for _ in 0..STEPS {
            let sample = sample(pid, main);
            let begun = Instant::now();
            let unwound = unwind(&mut tables, &image, &interpreter, &sample);
            time += begun.elapsed();
            let named = names(&image, &interpreter, &unwound);
            samples += 1;
            let is_whole = unwound.end == StackEnd::Complete
                && !named.iter().any(|name| name.starts_with("[anon") || name.starts_with("[none"));
            whole += u32::from(is_whole);
            let java: Vec<String> = named
                .iter()
                .filter(|name| {
                    !name.starts_with('[')
                        && name.rsplit_once(' ').unwrap().0.contains('.')
                        && !is_hidden(name)
                })
                .cloned()
                .collect();
            let spin = java.iter().position(|frame| frame.starts_with("Spin.spin "));
            let mut is_good = is_whole;
            if let Some(spin) = spin {
                all += 1;
                let line: u32 = java[spin].rsplit(' ').next().unwrap().parse().unwrap();
                let case = printed.iter().find(|(_, stack)| stack[1..] == java[spin + 1..]);
                let leaf = spin == 0
                    || spin == 1
                        && (java[0].starts_with("Spin.burn ")
                            || java[0].starts_with("java.lang.System.nanoTime "));
                is_good &= case.is_some() && leaf && (first..=first + 2).contains(&line);
                if is_good {
                    good += 1;
                    *seen.entry(case.unwrap().0).or_default() += 1;
                }
            }
            if !is_good {
                let raw = sample.raw.as_ref().unwrap();
                odd.entry(format!("{:?} {:?}", unwound.end, &named)).or_insert((0, raw.pc)).0 += 1;
            }
            ptrace(libc::PTRACE_SINGLESTEP, main, signal);
            signal = wait_for(pid, main);
        }
        ptrace(libc::PTRACE_CONT, main, signal);
        thread::sleep(Duration::from_millis(7));
    }
    eprintln!(
        "{flags:?}: {whole} whole of {samples}, {good} good of {all} in spin, {:?} each; {seen:?}",
        time / samples
    );
    let mut odd: Vec<_> = odd.into_iter().collect();
    odd.sort_by_key(|(_, (count, _))| std::cmp::Reverse(*count));
    for (stack, (count, pc)) in odd.iter().take(14) {
        eprintln!("{count} at {pc:#x}: {stack}");
    }
    assert!(whole * 100 >= samples * 99, "{whole} of {samples}");
    assert!(all > 1000 && good * 100 >= all * 99, "{good} of {all}");
}

#[test]
fn each_instruction_of_the_java_interpreter_has_its_stack() {
    check(&["-Xint"], 1);
}

#[test]
fn each_instruction_of_the_first_java_compiler_has_its_stack() {
    check(&["-XX:TieredStopAtLevel=1"], 20);
}

#[test]
fn each_instruction_of_inlined_java_methods_has_its_stack() {
    check(&[], 40);
}
