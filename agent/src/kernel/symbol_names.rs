//! Names of kernel functions, from the BPF program `name_symbols`: it asks the kernel for single addresses.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
};

use gannet_bpf::{GannetSkel, types};
use libbpf_rs::{MapCore as _, MapFlags, MapHandle, libbpf_sys};

use crate::model::{KernelName, KernelNamer};

/// Addresses of one run of the program.
const BATCH: usize = 32;
/// Bytes of a name with its module and the zero byte behind it.
const TEXT_BYTES: usize = 576;
const COUNT_BYTES: usize = size_of::<u64>();
const TEXTS_AT: usize = COUNT_BYTES + BATCH * size_of::<u64>();
const _: () = assert!(
    size_of::<types::symbol_names>() == TEXTS_AT + BATCH * TEXT_BYTES,
    "the layout of struct symbol_names"
);

/// The program and its map. They stay in the kernel while this is open.
#[derive(Debug)]
pub(super) struct SymbolNames {
    program: OwnedFd,
    map: MapHandle,
}

impl SymbolNames {
    /// Returns `None` on kernels that cannot name addresses (before 5.13, or without a list of symbols).
    pub(super) fn open(skeleton: &GannetSkel<'static>) -> Option<Self> {
        let program = skeleton.progs.name_symbols.as_fd().try_clone_to_owned().ok()?;
        let map = MapHandle::try_from(&skeleton.maps.symbol_names).ok()?;
        let mut this = Self { program, map };
        this.names(&[0]).is_ok().then_some(this)
    }

    /// Names up to [`BATCH`] addresses.
    fn batch(&mut self, addresses: &[u64], names: &mut Vec<Option<KernelName>>) -> io::Result<()> {
        let mut value = vec![0; size_of::<types::symbol_names>()];
        let words = std::iter::once(addresses.len() as u64).chain(addresses.iter().copied());
        for (place, word) in value.chunks_exact_mut(size_of::<u64>()).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        let key = 0_u32.to_ne_bytes();
        self.map.update(&key, &value, MapFlags::ANY).map_err(io::Error::other)?;
        let mut options = libbpf_sys::bpf_test_run_opts {
            sz: size_of::<libbpf_sys::bpf_test_run_opts>() as libbpf_sys::size_t,
            ..Default::default()
        };
        // SAFETY: The descriptor is open, and the call writes only to `options`, whose size is in it.
        let status =
            unsafe { libbpf_sys::bpf_prog_test_run_opts(self.program.as_raw_fd(), &raw mut options) };
        if status < 0 {
            return Err(io::Error::from_raw_os_error(-status));
        }
        if options.retval as usize != addresses.len() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let value = self.map.lookup(&key, MapFlags::ANY).map_err(io::Error::other)?.unwrap_or_default();
        let texts = value.get(TEXTS_AT..).unwrap_or_default().chunks_exact(TEXT_BYTES);
        names.extend(texts.take(addresses.len()).map(parse));
        Ok(())
    }
}

impl KernelNamer for SymbolNames {
    fn names(&mut self, addresses: &[u64]) -> io::Result<Vec<Option<KernelName>>> {
        let mut names = Vec::with_capacity(addresses.len());
        addresses.chunks(BATCH).try_for_each(|batch| self.batch(batch, &mut names))?;
        Ok(names)
    }
}

/// Reads `name` or `name [module]`. A number stands for an address without a name.
fn parse(text: &[u8]) -> Option<KernelName> {
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    let (name, module) = match text.strip_suffix(']').and_then(|text| text.split_once(" [")) {
        Some((name, module)) => (name, module),
        None => (&*text, if is_of_bpf(&text) { "bpf" } else { "" }),
    };
    if name.is_empty() || name.starts_with("0x") {
        return None;
    }
    Some(KernelName { name: name.to_owned(), module: module.to_owned() })
}

/// Tells BPF programs from functions of the kernel such as `bpf_prog_run`: here the kernel leaves out the module that
/// `/proc/kallsyms` shows for them.
fn is_of_bpf(name: &str) -> bool {
    let is_tag = |text: &str| text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let program =
        name.strip_prefix("bpf_prog_").map(|rest| rest.split_once('_').map_or(rest, |(tag, _)| tag));
    let trampoline = name.strip_prefix("bpf_trampoline_");
    program.is_some_and(is_tag)
        || trampoline
            .is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_of_the_kernel_is_a_name_a_module_or_nothing() {
        for (text, wanted) in [
            ("do_syscall_64", Some(("do_syscall_64", ""))),
            ("nf_conntrack_in [nf_conntrack]", Some(("nf_conntrack_in", "nf_conntrack"))),
            ("bpf_prog_6deef7357e7b4530_sample", Some(("bpf_prog_6deef7357e7b4530_sample", "bpf"))),
            ("bpf_prog_6deef7357e7b4530", Some(("bpf_prog_6deef7357e7b4530", "bpf"))),
            ("bpf_trampoline_6442489857", Some(("bpf_trampoline_6442489857", "bpf"))),
            ("bpf_prog_run", Some(("bpf_prog_run", ""))),
            ("bpf_trampoline_enter", Some(("bpf_trampoline_enter", ""))),
            ("0x0", None),
            ("0xffffffff81000000", None),
            ("", None),
        ] {
            let wanted = wanted.map(|(name, module)| KernelName { name: name.into(), module: module.into() });
            let mut bytes = text.as_bytes().to_vec();
            bytes.extend(b"\0left over");
            assert_eq!(parse(&bytes), wanted, "{text}");
        }
    }
}
