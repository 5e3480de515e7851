//! Compares stacks of distributions' programs with framehop, an unwinder that shares no code with this crate.
//!
//! The test stops each program a few times while it works, by ptrace on its own children (which needs no privilege).
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

mod common;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::process::Command;
use std::time::Duration;

use common::{Files, Process, Tables, Thread, capture, family, start, which};
use framehop::x86_64::{CacheX86_64, UnwindRegsX86_64, UnwinderX86_64};
use framehop::{ExplicitModuleSectionInfo, Module, Unwinder};
use gannet_unwind::unwind::UnwindEnd;
use object::{Object, ObjectSection};

/// Command lines that keep a program busy, or at least alive, for a second.
const BUSY: &[&str] = &[
    "python3 -c \"import re,json\nwhile True: json.loads(json.dumps([re.sub('a','b','banana'*50)]*50))\"",
    "perl -e 'while(1){my %h; $h{$_ % 97}.=sprintf(\"%d\",$_) for 1..2000; sort keys %h}'",
    "bash -c 'f(){ local i; for i in 1 2 3 4; do ((x+=i)); done; }; while :; do f; done'",
    "dash -c 'while :; do x=$((x+1)); done'",
    "sh -c 'seq 1 30000000 | sort -R'",
    "find / -xdev -type f -size +1k -name '*q*'",
    "sh -c 'while :; do git log --stat -3; done'",
    "gcc -O2 -fsyntax-only -x c LARGE",
    "gcc -O2 -S -o /dev/null -x c LARGE",
    "xz -9 -c -T1 LIBC LIBC LIBC",
    "gzip -9 -c LIBC LIBC LIBC LIBC LIBC LIBC LIBC LIBC LIBC LIBC",
    "bzip2 -9 -c LIBC LIBC LIBC LIBC LIBC LIBC LIBC",
    "zstd -19 -c LIBC LIBC LIBC",
    "openssl speed -seconds 2 sha256",
    "openssl speed -seconds 2 rsa2048",
    "openssl prime -generate -bits 4096",
    "mawk 'BEGIN{while(1){a[i++%1000]=sqrt(i) \"x\"}}'",
    "sed -n -e ':a;s/^\\(.*\\)$/\\1x/;ba' /etc/passwd",
    "sh -c 'seq 1 20000000 | grep -E \"(1|2)+3.*[45]{2}7\"'",
    "tar cf /dev/null /usr/share /usr/lib/python3",
    "sha256sum /dev/zero",
    "md5sum /dev/zero",
    "sha512sum /dev/zero",
    "b2sum /dev/zero",
    "cksum /dev/zero",
    "node -e 'setTimeout(()=>{},3000)'",
    "sqlite3 :memory: \"with recursive c(x) as (select 1 union all select x+1 from c limit 90000000) select sum(x*x%7) from c\"",
    "jq -n '[range(9000000)]|map(.*2)|add'",
    "sh -c 'echo \"for(i=0;i<99999999;i++)x=x*3%1000007\" | bc'",
    "dd if=/dev/zero of=/dev/null bs=512",
    "od -A x /dev/zero -v",
    "base64 /dev/zero",
    "wc /dev/zero",
    "objdump -d CC1",
    "readelf -wf CC1",
    "nm -D LIBC --demangle",
    "strings -n 3 CC1",
    "cmp /dev/zero /dev/zero",
    "tail -f /dev/null",
    "sleep 5",
    "yes",
    "seq 1 999999999",
    "factor 340282366920938463463374607431768211297 340282366920938463463374607431768211283",
    "sh -c 'yes abc | tr a-c d-f'",
    "sh -c 'yes abc,def | cut -d, -f2'",
    "sh -c 'yes | uniq -c'",
    "shuf -i 1-30000000",
    "sh -c 'seq 1 9000000 | tac'",
    "sh -c 'seq 1 90000000 | numfmt --to=si'",
    "sh -c 'seq 1 9000000 | split - /dev/null --filter=cat'",
    "xxd /dev/zero",
    "top -b -d 0.05",
    "sh -c 'while :; do ps axf; done'",
    "file -m /usr/share/misc/magic /usr/bin/*",
    "diff -r /usr/share/doc /usr/share/man",
    "sh -c 'yes 1 | xargs -n 4 true'",
    "make -C / -r -n -f /dev/null --debug=a",
    "rsync -n -r --list-only /usr/share /tmp/nothing",
    "tclsh",
    "clang-14 -O2 -c -o /dev/null -x c LARGE",
    "less /etc/passwd",
    "ssh-keygen -t rsa -b 8192 -N '' -f /dev/null/none",
    "dpkg-query -W",
    "curl --no-progress-meter file:///dev/zero",
];

struct Framehop {
    unwinder: UnwinderX86_64<Vec<u8>>,
    cache: CacheX86_64,
}

fn framehop_of(process: &Process, tables: &Tables) -> Framehop {
    let mut unwinder = UnwinderX86_64::new();
    for (mapping, _, bias) in tables.iter() {
        let bytes = if mapping.path == "[vdso]" {
            process.vdso.clone()
        } else {
            match fs::read(&mapping.path) {
                Ok(bytes) => bytes,
                Err(_) => continue,
            }
        };
        // Code in a file that is no ELF file is unknown to framehop too.
        let Ok(file) = object::File::parse(&*bytes) else { continue };
        let section = |name: &str| {
            let section = file.section_by_name(name)?;
            let range = section.address()..section.address() + section.size();
            Some((range, section.data().ok()?.to_vec()))
        };
        let (eh_frame_svma, eh_frame) = section(".eh_frame").unzip();
        let (eh_frame_hdr_svma, eh_frame_hdr) = section(".eh_frame_hdr").unzip();
        let (text_svma, _) = section(".text").unzip();
        let (got_svma, _) = section(".got").unzip();
        let info = ExplicitModuleSectionInfo {
            base_svma: 0,
            text_svma,
            got_svma,
            eh_frame_svma,
            eh_frame,
            eh_frame_hdr_svma,
            eh_frame_hdr,
            ..Default::default()
        };
        unwinder.add_module(Module::new(mapping.path.clone(), mapping.start..mapping.end, *bias, info));
    }
    Framehop { unwinder, cache: CacheX86_64::new() }
}

impl Framehop {
    fn unwind(&mut self, thread: &Thread) -> (Vec<u64>, bool) {
        let regs = UnwindRegsX86_64::new(thread.pc, thread.registers[7], thread.registers[6]);
        let mut read = |address: u64| {
            let at = address.checked_sub(thread.registers[7]).ok_or(())? as usize;
            let bytes = thread.stack.get(at..).and_then(<[u8]>::first_chunk).ok_or(())?;
            Ok(u64::from_le_bytes(*bytes))
        };
        let mut frames = self.unwinder.iter_frames(thread.pc, regs, &mut self.cache, &mut read);
        let mut found = Vec::new();
        loop {
            match frames.next() {
                Ok(Some(frame)) if found.len() < 1024 => found.push(frame.address()),
                Ok(None) => return (found, true),
                _ => return (found, false),
            }
        }
    }
}

fn arguments(line: &str, large: &str) -> Option<Command> {
    let program = line.split_whitespace().next()?;
    which(program)?;
    let libc = "/usr/lib/x86_64-linux-gnu/libc.so.6";
    let cc1 = which("x86_64-linux-gnu-lto-dump-12").or_else(|| which("perf")).or_else(|| which("gdb"))?;
    let line = line.replace("LARGE", large).replace("LIBC", libc).replace("CC1", cc1.to_str()?);
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(format!("exec {line}")).current_dir(env!("CARGO_MANIFEST_DIR"));
    Some(command)
}

/// C that keeps a compiler busy for seconds.
fn large_source() -> String {
    let mut source = String::new();
    for n in 0..1500 {
        writeln!(
            source,
            "struct s{n} {{ int a[{n}+1]; double d; }};\ndouble f{n}(struct s{n} *s, int k) {{ double r = 0; \
             for (int i = 0; i < k; i++) {{ if (s->a[i % ({n}+1)] > i) r += s->d * i; else r -= s->a[0] / (i + 1.0); \
             switch (i % 7) {{ case 1: r *= 2; break; case 3: r -= k; break; case 5: r += {n}; }} }} return r; }}"
        )
        .unwrap();
    }
    source
}

/// Checks at least 30 programs of this machine (R48).
#[test]
fn an_independent_unwinder_agrees_on_system_programs() {
    let directory = tempfile::tempdir().unwrap();
    let large = directory.path().join("large.c");
    fs::write(&large, large_source()).unwrap();
    let mut files = Files::default();
    let mut programs = BTreeSet::new();
    let (mut stacks, mut agreed, mut complete, mut framehop_complete, mut frames) = (0, 0, 0, 0, 0);
    let mut early = 0;
    let mut gave_up_in = String::new();
    let mut differences = String::new();
    for line in BUSY {
        let Some(mut command) = arguments(line, large.to_str().unwrap()) else { continue };
        let running = start(&mut command);
        std::thread::sleep(Duration::from_millis(120));
        for _ in 0..5 {
            for pid in family(running.0.id()) {
                let Some(process) = capture(pid) else { continue };
                let exe = fs::read_link(format!("/proc/{pid}/exe"));
                let Some(exe) = exe.ok().and_then(|exe| Some(exe.file_name()?.to_str()?.to_owned())) else {
                    continue;
                };
                let tables = Tables::of(&process, &mut files);
                let mut framehop = framehop_of(&process, &tables);
                for thread in &process.threads {
                    let ours = thread.unwind(&tables);
                    let pcs: Vec<u64> = ours.frames.iter().map(|frame| frame.pc).collect();
                    let (theirs, they_finished) = framehop.unwind(thread);
                    programs.insert(exe.clone());
                    stacks += 1;
                    frames += pcs.len();
                    complete += u32::from(ours.end == UnwindEnd::Complete);
                    framehop_complete += u32::from(they_finished);
                    // framehop knows no frame address in a register other than rsp and rbp, and no pair of loads; there it
                    // gives up, or believes to be at the end.
                    let gave_up = ours.end == UnwindEnd::Complete && pcs.starts_with(&theirs);
                    if pcs == theirs {
                        agreed += 1;
                    } else if gave_up {
                        early += 1;
                        writeln!(gave_up_in, "{exe}: after {} of {} frames", theirs.len(), pcs.len())
                            .unwrap();
                    } else {
                        let at = pcs.iter().zip(&theirs).take_while(|(a, b)| a == b).count();
                        let place = |pc: Option<&u64>| {
                            pc.and_then(|pc| {
                                let (mapping, _, bias) =
                                    tables.iter().find(|(m, _, _)| m.start < *pc && *pc <= m.end)?;
                                Some(format!("{:#x} in {}", pc - bias, mapping.path))
                            })
                        };
                        writeln!(
                            differences,
                            "{exe}: frame {at}: ours {:x?}, theirs {:x?}, before it {:?}; ours has {} and ends {:?}, theirs has {} ({they_finished})",
                            pcs.get(at),
                            theirs.get(at),
                            place(at.checked_sub(1).and_then(|at| pcs.get(at))),
                            pcs.len(),
                            ours.end,
                            theirs.len(),
                        )
                        .unwrap();
                    }
                }
            }
            std::thread::sleep(Duration::from_millis(15));
        }
    }
    let share = 100.0 * f64::from(agreed) / f64::from(stacks - early);
    println!(
        "{} programs, {stacks} stacks of {:.1} frames: framehop agrees on {share:.2} %; complete: ours {complete}, framehop's {framehop_complete}, which gave up on {early}:\n{gave_up_in}{differences}\n{programs:?}",
        programs.len(),
        frames as f64 / f64::from(stacks),
    );
    assert!(programs.len() >= 30, "only {programs:?} could be run: install more of the usual programs");
    assert!(share >= 99.0, "framehop agrees on {share:.2} % only:\n{differences}");
    assert!(early * 20 < stacks, "framehop gave up on {early} of {stacks} stacks:\n{gave_up_in}");
    assert!(complete * 100 >= stacks * 99, "{complete} of {stacks} stacks are complete:\n{differences}");
}
