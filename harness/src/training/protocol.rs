//! How keywords become sessions: base classes first, then ways of shots.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// What is asked for, whatever keywords there are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Asked {
    /// Base classes: four sevenths of the keywords or more if absent, see [`Protocol::new`].
    pub base: Option<usize>,
    /// Classes of an incremental session.
    pub ways: usize,
    /// The most clips that a later class is known from.
    pub shots: usize,
}

impl Default for Asked {
    fn default() -> Self {
        Self {
            base: None,
            ways: 3,
            shots: 5,
        }
    }
}

/// What comes of it for some keywords.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Protocol {
    pub base: usize,
    pub sessions: usize,
    pub ways: usize,
    pub shots: usize,
}

impl Protocol {
    /// Whole sessions of all keywords behind the base classes. If no number of these is asked for, three sevenths of the keywords come
    /// in sessions, but at most five: 20 base classes and five sessions of three, of 35 keywords.
    pub(crate) fn new(asked: Asked, keywords: usize) -> Result<Self, String> {
        let Asked { base, ways, shots } = asked;
        let sessions = match base {
            None => (keywords * 3 / 7 / ways).min(5),
            Some(base) => match keywords.checked_sub(base) {
                Some(later) if later % ways == 0 => later / ways,
                _ => {
                    return Err(format!(
                        "{base} base classes and sessions of {ways} do not add up to {keywords} keywords"
                    ));
                }
            },
        };
        Ok(Self {
            base: keywords - sessions * ways,
            sessions,
            ways,
            shots,
        })
    }

    /// With as many shots as every later class has, of keywords with so many training clips each.
    pub(super) fn with_shots_of(self, clips: &[usize]) -> Self {
        let later = clips[self.base..].iter().copied();
        Self {
            shots: later.fold(self.shots, usize::min),
            ..self
        }
    }

    pub(crate) fn classes(&self) -> usize {
        self.base + self.sessions * self.ways
    }

    /// Which of a class's training clips take part: all of a base class, and the shots of a later one, drawn from the seed.
    pub(super) fn drawn(&self, class: usize, clips: usize, seed: u64) -> Vec<usize> {
        let mut drawn: Vec<usize> = (0..clips).collect();
        if class >= self.base {
            let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x5407);
            rng.set_stream(class as u64);
            drawn.shuffle(&mut rng);
            drawn.truncate(self.shots);
        }
        drawn
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn of(base: Option<usize>, ways: usize, keywords: usize) -> Result<(usize, usize), String> {
        let asked = Asked {
            base,
            ways,
            ..Asked::default()
        };
        let protocol = Protocol::new(asked, keywords)?;
        assert_eq!(protocol.classes(), keywords);
        assert!(protocol.base >= 2);
        Ok((protocol.base, protocol.sessions))
    }

    #[test]
    fn the_protocol_of_35_keywords_is_20_base_classes_and_five_sessions_of_three() {
        assert_eq!(of(None, 3, 35), Ok((20, 5)));
        assert_eq!(of(None, 5, 35), Ok((20, 3)));
        assert_eq!(of(None, 1, 35), Ok((30, 5)));
        for keywords in 2..40 {
            for ways in 1..40 {
                assert!(of(None, ways, keywords).is_ok());
            }
        }
    }

    #[test]
    fn base_classes_and_whole_sessions_are_all_keywords() {
        assert_eq!(of(Some(25), 2, 35), Ok((25, 5)));
        assert_eq!(of(Some(35), 3, 35), Ok((35, 0)));
        assert_eq!(
            of(Some(20), 4, 35),
            Err("20 base classes and sessions of 4 do not add up to 35 keywords".to_owned())
        );
        assert!(of(Some(36), 1, 35).is_err());
    }

    #[test]
    fn later_classes_have_as_many_shots_as_the_one_with_the_fewest_clips() {
        let protocol = Protocol::new(Asked::default(), 14).expect("no number of base classes");
        let mut clips = [9; 14];
        assert_eq!(protocol.with_shots_of(&clips).shots, 5);
        clips[12] = 3;
        let protocol = protocol.with_shots_of(&clips);
        assert_eq!((protocol.base, protocol.shots), (8, 3));
        assert_eq!(protocol.drawn(7, 9, 1), (0..9).collect::<Vec<_>>());
        let drawn = [8, 9].map(|class| protocol.drawn(class, 9, 1));
        assert_eq!(protocol.drawn(8, 9, 1), drawn[0]);
        assert_ne!(drawn[0], drawn[1]);
        for shots in drawn {
            let different: HashSet<usize> = shots.iter().copied().collect();
            assert_eq!((shots.len(), different.len()), (3, 3));
            assert!(shots.iter().all(|&shot| shot < 9));
        }
    }
}
