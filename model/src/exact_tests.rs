//! Device-independent arithmetic against loops over f32 in Rust, which follows IEEE 754: bit for bit.
#![expect(clippy::expect_used, reason = "tests")]

use super::*;
use crate::device::for_tests;
use tch::Device;
use volary_core::random::{Purpose, Stream};

fn draws(stream: &mut Stream, count: usize) -> Vec<f32> {
    // Many magnitudes, so that the order of additions shows.
    (0..count)
        .map(|_| ((stream.next_f64() - 0.3) * (stream.next_f64() * 40.0 - 20.0).exp2()) as f32)
        .collect()
}

fn numbers(x: &Tensor) -> Vec<u32> {
    let values: Vec<f32> = Vec::try_from(x.flatten(0, -1).to_device(Device::Cpu)).expect("floats");
    values.into_iter().map(f32::to_bits).collect()
}

/// The tree as a loop.
fn halved(mut x: Vec<f32>) -> f32 {
    while x.len() > 1 {
        let half = x.len() / 2;
        let mut sums: Vec<f32> = (0..half).map(|i| x[i] + x[x.len() - half + i]).collect();
        sums.extend((x.len() % 2 == 1).then(|| x[half]));
        x = sums;
    }
    x[0]
}

/// The sum of a column: of blocks, then of their sums.
fn summed_in_blocks(x: &[f32]) -> f32 {
    if x.len() <= BLOCK as usize {
        return halved(x.to_vec());
    }
    summed_in_blocks(&x.chunks(BLOCK as usize).map(|block| halved(block.to_vec())).collect::<Vec<_>>())
}

#[test]
fn sums_are_the_documented_trees_to_the_bit() {
    let mut stream = Stream::new(31, Purpose::Faults, &[]);
    let device = for_tests();
    // The last ones need several chunks and blocks, with a remainder.
    for (rows, columns) in [(1, 1), (1, 7), (5, 1), (3, 4), (64, 9), (65, 33), (200, 1_000), (4_099, 67)] {
        let x = draws(&mut stream, rows * columns);
        let ours = Tensor::from_slice(&x).view([rows as i64, columns as i64]).to_device(device);
        let by_row: Vec<f32> = x.chunks(columns).map(|row| halved(row.to_vec())).collect();
        let column = |at: usize| x.iter().skip(at).step_by(columns).copied().collect::<Vec<_>>();
        let by_column: Vec<f32> = (0..columns).map(|at| summed_in_blocks(&column(at))).collect();
        let bits = |x: &[f32]| x.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let what = format!("[{rows}, {columns}]");
        assert_eq!(numbers(&sum_rows(&ours).expect("sums")), bits(&by_row), "{what}");
        assert_eq!(numbers(&sum_columns(&ours).expect("sums")), bits(&by_column), "{what}");
        let square = |row: &[f32]| halved(row.iter().map(|value| value * value).collect());
        let total = halved(x.chunks(columns).map(square).collect());
        let root = (total / (rows * columns) as f32).sqrt();
        assert_eq!(numbers(&root_mean_square(&ours).expect("a root")), [root.to_bits()], "{what}");
        let mean_row = halved(by_row) / rows as f32;
        assert_eq!(numbers(&mean(&sum_rows(&ours).expect("sums")).expect("a mean")), [mean_row.to_bits()]);
        // A transposed view has other strides and the same numbers.
        assert_eq!(numbers(&sum_columns(&ours.tr().contiguous().tr()).expect("sums")), bits(&by_column));
        let squares: Vec<f64> = x.iter().map(|value| f64::from(value * value)).collect();
        let exact = squares.iter().sum::<f64>();
        let norm = squared_norm(&ours).expect("a norm").double_value(&[0]);
        // f64 in two orders.
        assert!((norm - exact).abs() <= 1e-12 * exact, "{what}: {norm} {exact}");
    }
}

/// What the update is made of is rounded as IEEE 754 demands, in every lane of the vector units and in the
/// rest of a length that they do not divide.
#[test]
fn the_operations_of_an_update_are_correctly_rounded() {
    let mut stream = Stream::new(32, Purpose::Faults, &[]);
    let count = 1_000_003;
    let (x, y) = (draws(&mut stream, count), draws(&mut stream, count));
    let x: Vec<f32> = x.into_iter().map(f32::abs).collect();
    let [a, b] = [&x, &y].map(|x| Tensor::from_slice(x).to_device(for_tests()));
    let check = |name: &str, ours: Tensor, theirs: &dyn Fn(f32, f32) -> f32| {
        let theirs: Vec<u32> = x.iter().zip(&y).map(|(x, y)| theirs(*x, *y).to_bits()).collect();
        let ours = numbers(&ours);
        let wrong = ours.iter().zip(&theirs).filter(|(ours, theirs)| ours != theirs).count();
        assert_eq!(wrong, 0, "{name}: {wrong} of {count} numbers differ");
    };
    check("add", &a + &b, &|x, y| x + y);
    check("multiply", &a * &b, &|x, y| x * y);
    check("divide", &a / &b, &|x, y| x / y);
    check("square root", root(&a).expect("roots"), &|x, _| x.sqrt());
    check("multiply by a number", a.f_mul_scalar(0.1).expect("a product"), &|x, _| x * 0.1f64 as f32);
    check("divide by a number", divide(&a, 0.3).expect("a quotient"), &|x, _| x / 0.3f64 as f32);
    check("add a number", a.f_add_scalar(1e-8).expect("a sum"), &|x, _| x + 1e-8f64 as f32);
}
