//! Kahan's compensated sum: the rounding error of each addition is carried into the next; that of a sum that is no longer finite
//! is not, so that a sum with an infinity is that infinity.

use cubecl::prelude::*;

/// Lane by lane, from any state on.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct KahanLanes<N: Size> {
    pub sum: Vector<f32, N>,
    pub carry: Vector<f32, N>,
}

#[cube]
impl<N: Size> KahanLanes<N> {
    pub(crate) fn add(&mut self, value: Vector<f32, N>) {
        let corrected = value - self.carry;
        let next = self.sum + corrected;
        let carry = (next - self.sum) - corrected;
        let finite = carry.abs().less_equal(&Vector::<f32, N>::new(f32::MAX));
        self.carry = select_many(finite, carry, Vector::<f32, N>::new(0.0));
        self.sum = next;
    }
}

/// Chains that a long sum is gathered in, so that no addition waits for the one before it.
const CHAINS: usize = 4;
type Chains = Const<4>;

/// The sum of `values[first..first + count]`, of which this unit adds its part: four neighbours at a time, `units` apart.
#[cube]
pub(crate) fn sum_of_unit(
    values: &[f32],
    first: usize,
    count: usize,
    unit: usize,
    #[comptime] units: usize,
) -> f32 {
    let zero = Vector::<f32, Chains>::new(0.0);
    let mut chains = KahanLanes::<Chains> {
        sum: zero,
        carry: zero,
    };
    let whole = count / CHAINS;
    let mut group = unit;
    while group < whole {
        let at = first + group * CHAINS;
        let mut some = Vector::<f32, Chains>::empty();
        #[unroll]
        for i in 0..CHAINS {
            some.insert(i, values[at + i]);
        }
        chains.add(some);
        group += units;
    }
    let mut all = Kahan::new();
    let mut rest = whole * CHAINS + unit;
    while rest < count {
        all.add(values[first + rest]);
        rest += units;
    }
    #[unroll]
    for i in 0..CHAINS {
        all.add(chains.sum.extract(i));
        all.add(-chains.carry.extract(i));
    }
    all.total()
}

#[derive(CubeType)]
pub(crate) struct Kahan {
    sum: f32,
    carry: f32,
}

#[cube]
impl Kahan {
    pub(crate) fn new() -> Kahan {
        Kahan {
            sum: 0.0f32.runtime(),
            carry: 0.0f32.runtime(),
        }
    }

    pub(crate) fn add(&mut self, value: f32) {
        let corrected = value - self.carry;
        let next = self.sum + corrected;
        let carry = (next - self.sum) - corrected;
        self.carry = select(carry.abs() <= f32::MAX, carry, 0.0);
        self.sum = next;
    }

    pub(crate) fn total(&self) -> f32 {
        self.sum
    }
}
