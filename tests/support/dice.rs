//! Random numbers that depend on the seed alone, not on the version of a crate.

/// SplitMix64 ([Steele, Lea, Flood 2014](https://doi.org/10.1145/2714064.2660195)).
pub struct Dice(u64);

impl Dice {
    /// The same seed gives the same numbers.
    pub fn new(seed: u64) -> Dice {
        Dice(seed)
    }

    /// Mixes a text into the seed, so that something with a name has numbers of its own.
    pub fn for_name(seed: u64, name: &str) -> Dice {
        let mut dice = Dice(seed);
        for byte in name.bytes() {
            dice.0 = dice.roll() ^ u64::from(byte);
        }
        dice
    }

    /// The next 64 bits.
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number from 0 to `limit` - 1.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.roll() % limit
    }

    /// A size or an index from 0 to `limit` - 1.
    pub fn size_below(&mut self, limit: usize) -> usize {
        self.below(limit as u64) as usize
    }

    /// True in this many of a thousand cases.
    pub fn happens(&mut self, of_a_thousand: u64) -> bool {
        self.below(1000) < of_a_thousand
    }

    /// One of these.
    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.size_below(choices.len())]
    }
}
