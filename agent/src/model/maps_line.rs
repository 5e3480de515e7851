//! Lines of `/proc/PID/maps`: proc_pid_maps(5).

use std::{fs::File, io};

/// The file of a mapping, by device and inode number as the kernel shows them.
pub(crate) type MapsFile = (String, String);

/// One mapping of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MapsLine<'a> {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Offset in the file.
    pub(crate) offset: u64,
    /// `rwxp`, with `-` for each right that is missing.
    rights: &'a str,
    /// Major and minor number in hexadecimal, with `:` between them.
    pub(crate) device: &'a str,
    pub(crate) inode: &'a str,
    /// Path or name; empty without one. ` (deleted)` may follow, and a newline is `\012`.
    pub(crate) path: &'a str,
}

impl<'a> MapsLine<'a> {
    /// Parses a line; `None` if it is invalid.
    pub(crate) fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.splitn(6, ' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let (rights, offset) = (fields.next()?, fields.next()?);
        let (device, inode) = (fields.next()?, fields.next()?);
        let path = fields.next().unwrap_or("").trim_start();
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let (start, end, offset) = (hex(start)?, hex(end)?, hex(offset)?);
        (start < end).then_some(Self { start, end, offset, rights, device, inode, path })
    }

    /// Reports whether the process may read the mapping.
    pub(crate) fn is_readable(&self) -> bool {
        self.rights.starts_with('r')
    }

    /// Reports whether the mapping holds code.
    pub(crate) fn is_code(&self) -> bool {
        self.rights.as_bytes().get(2) == Some(&b'x')
    }

    /// Returns the file of the mapping.
    pub(crate) fn file(&self) -> MapsFile {
        (self.device.to_owned(), self.inode.to_owned())
    }
}

/// Opens the file of a mapping of a process, also if it is deleted or in another mount namespace. The call may wait without end.
pub(crate) fn open_mapped(tgid: u32, start: u64, end: u64) -> io::Result<File> {
    // The names have no leading zeros.
    File::open(format!("/proc/{tgid}/map_files/{start:x}-{end:x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_range_rights_file_and_path() {
        let line = MapsLine::parse("55d0de001000-55d0de002000 r-xp 00001000 08:01 7            /usr/bin/a b")
            .unwrap();
        assert_eq!((line.start, line.end, line.offset), (0x55d0_de00_1000, 0x55d0_de00_2000, 0x1000));
        assert!(line.is_readable() && line.is_code());
        assert_eq!((line.file(), line.path), (("08:01".to_owned(), "7".to_owned()), "/usr/bin/a b"));
        let line = MapsLine::parse("1000-2000 ---p 0 00:00 0 ").unwrap();
        assert_eq!((line.is_readable(), line.is_code(), line.path), (false, false, ""));
        for bad in
            ["", "nonsense", "2000-1000 r-xp 0 00:00 0 /a", "1000-2000 r-xp x 00:00 0 /a", "1000-2000 r-xp 0"]
        {
            assert_eq!(MapsLine::parse(bad), None, "{bad}");
        }
    }
}
