//! The format `RowBinary` of ClickHouse, as far as the queries of this module use it: integers in little endian, texts and arrays behind
//! their length in LEB128.

/// Bytes of one text or items of one array. A longer one is damaged.
const MAX_LENGTH: u64 = 64 << 20;

/// Why a row cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RowError {
    /// The row does not end in these bytes.
    Cut,
    /// No row looks like this.
    Damaged,
    /// The caller takes no more rows.
    TooMany,
}

/// Reads the columns of one row, in order.
pub(super) struct Row<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Row<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Number of bytes that the columns took so far.
    pub(super) fn end(&self) -> usize {
        self.at
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], RowError> {
        let end = self.at.checked_add(length).ok_or(RowError::Damaged)?;
        let taken = self.bytes.get(self.at..end).ok_or(RowError::Cut)?;
        self.at = end;
        Ok(taken)
    }

    pub(super) fn byte(&mut self) -> Result<u8, RowError> {
        Ok(self.take(1)?[0])
    }

    /// Reads a Boolean of type `UInt8`.
    pub(super) fn flag(&mut self) -> Result<bool, RowError> {
        Ok(self.byte()? != 0)
    }

    pub(super) fn long(&mut self) -> Result<i64, RowError> {
        let mut long = [0; 8];
        long.copy_from_slice(self.take(8)?);
        Ok(i64::from_le_bytes(long))
    }

    fn length(&mut self) -> Result<usize, RowError> {
        let (mut length, mut shift) = (0_u64, 0);
        loop {
            let byte = self.byte()?;
            length |= u64::from(byte & 127) << shift;
            shift += 7;
            if length > MAX_LENGTH || shift > 35 {
                return Err(RowError::Damaged);
            }
            if byte < 128 {
                return usize::try_from(length).map_err(|_| RowError::Damaged);
            }
        }
    }

    /// Reads a text. Bytes that are not UTF-8 become U+FFFD.
    pub(super) fn text(&mut self) -> Result<String, RowError> {
        let length = self.length()?;
        Ok(String::from_utf8_lossy(self.take(length)?).into_owned())
    }

    /// Reads an array.
    pub(super) fn array<T>(
        &mut self,
        mut item: impl FnMut(&mut Self) -> Result<T, RowError>,
    ) -> Result<Vec<T>, RowError> {
        let length = self.length()?;
        // The length is a claim: the items that follow decide about the memory.
        let mut items = Vec::with_capacity(length.min(1024));
        for _ in 0..length {
            items.push(item(self)?);
        }
        Ok(items)
    }

    pub(super) fn longs(&mut self) -> Result<Vec<i64>, RowError> {
        self.array(Self::long)
    }

    pub(super) fn texts(&mut self) -> Result<Vec<String>, RowError> {
        self.array(Self::text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn columns_are_read_as_clickhouse_writes_them() {
        // SELECT 1::UInt8, -2::Int64, 'aé', [3, 4]::Array(Int64), ['', 'b'] FORMAT RowBinary
        let bytes = b"\x01\xfe\xff\xff\xff\xff\xff\xff\xff\x03a\xc3\xa9\x02\x03\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0\x02\0\x01b";
        let read = |bytes| {
            let mut row = Row::new(bytes);
            Ok::<_, RowError>((row.flag()?, row.long()?, row.text()?, row.longs()?, row.texts()?, row.end()))
        };
        let texts = vec![String::new(), "b".to_owned()];
        assert_eq!(read(bytes), Ok((true, -2, "aé".to_owned(), vec![3, 4], texts, bytes.len())));
        for length in 0..bytes.len() {
            assert_eq!(read(&bytes[..length]), Err(RowError::Cut), "{length}");
        }
    }

    #[test]
    fn a_length_beyond_the_limit_is_damage() {
        assert_eq!(Row::new(b"\xff\xff\xff\xff\xff\xff").text(), Err(RowError::Damaged));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Row::new(&bytes).texts();
            let _ = Row::new(&bytes).longs();
        }
    }
}
