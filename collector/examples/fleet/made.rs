//! Made profiles of a given size, for this program and for `ingest`.

use gannet_proto::pprof::{Builder, Header, Line, LocationId, Mapping, Profile, encode};

/// A xorshift generator: equal runs see equal profiles.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Returns a profile of the size, and the number of its samples.
pub(crate) fn profile(random: &mut Random, bytes: usize) -> (Profile, u64) {
    let types = [("samples", "count"), ("cpu", "nanoseconds")];
    for stacks in (5..).step_by(5) {
        let mut builder = Builder::new(Header {
            sample_types: &types,
            period_type: types[1],
            period: 10_000_000,
            time_nanos: 1_700_000_000_000_000_000,
            duration_nanos: 10_000_000_000,
        });
        let mapping = builder.mapping(Mapping {
            start: 0x1000,
            limit: 0x9_0000_0000,
            offset: 0,
            file: "/usr/bin/checkout",
            build_id: "4f1d",
        });
        let mut samples = 0;
        for _ in 0..stacks {
            // Callers are common to many stacks, as in a real program.
            let depth = 12 + random.below(20);
            let stack: Vec<LocationId> = (0..depth)
                .map(|level| {
                    let function = level * 40 + random.below(2 + (depth - level).pow(2) / 8);
                    let name = format!("checkout::module_{}::function_{function}", function % 37);
                    let file = format!("src/module_{}.rs", function % 37);
                    let line = Line {
                        name: &name,
                        system_name: &name,
                        file: &file,
                        line: function as i64 % 900,
                        column: 0,
                        start_line: 1,
                    };
                    builder.location(Some(mapping), 0x1000 + function * 64, &[line])
                })
                .collect();
            let count = 1 + random.below(3) as i64;
            samples += count as u64;
            builder.sample(&stack, &[count, count * 10_000_000], &[]);
        }
        let profile = builder.finish();
        if encode(&profile).len() >= bytes {
            return (profile, samples);
        }
    }
    unreachable!("profiles grow without a bound")
}
