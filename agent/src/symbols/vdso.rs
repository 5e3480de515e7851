//! The vDSO: the shared object that the kernel maps into every process, without a file.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::FileExt,
    sync::Arc,
};

use crate::model::MappedFile;

/// The name of the vDSO's mapping.
pub(super) const VDSO_MAPPING: &str = "[vdso]";
const MAX_VDSO_BYTES: u64 = 1 << 20;

/// Reads the vDSO from the agent's own memory: it is the same in all 64-bit processes.
pub(crate) fn vdso_image() -> io::Result<Vec<u8>> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let range = maps.lines().find(|line| line.ends_with(VDSO_MAPPING)).and_then(|line| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    });
    let (start, end) = range.ok_or(io::ErrorKind::NotFound)?;
    let mut image = vec![0; end.saturating_sub(start).min(MAX_VDSO_BYTES) as usize];
    File::open("/proc/self/mem")?.read_exact_at(&mut image, start)?;
    Ok(image)
}

/// Returns the vDSO as a file like any other: in memory that has a descriptor.
pub(super) fn vdso_file() -> io::Result<Arc<MappedFile>> {
    let mut file = File::from(rustix::fs::memfd_create("gannet-vdso", rustix::fs::MemfdFlags::CLOEXEC)?);
    file.write_all(&vdso_image()?)?;
    Ok(Arc::new(MappedFile::opened(VDSO_MAPPING, 0, 0, file)))
}
