//! The optimizers against step-by-step scalar versions in f64.
#![expect(clippy::expect_used, reason = "tests")]

use super::*;
use crate::device::for_tests;
use crate::weights::{Slot, state_shapes};
use tch::{Device, Kind};
use volary_core::Step;
use volary_core::options::Decay;
use volary_core::random::{Purpose, Stream};

const ROWS: usize = 5;
const COLUMNS: usize = 7;

fn draws(stream: &mut Stream, count: usize) -> Vec<f64> {
    (0..count).map(|_| f64::from((stream.next_f64() * 2.0 - 1.0) as f32)).collect()
}

fn tensor(values: &[f64], shape: &[i64]) -> Tensor {
    let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
    Tensor::from_slice(&values).view(shape).to_device(for_tests())
}

fn slot(optimizer: &Optimizer, weights: &[f64], shape: &[i64]) -> Slot {
    let zeros =
        |(name, shape): (&'static str, Vec<i64>)| (name, Tensor::zeros(&shape, (Kind::Float, for_tests())));
    let state = state_shapes(optimizer, shape).into_iter().map(zeros).collect();
    let role = if shape.len() > 1 { Role::Matrix } else { Role::Norm };
    Slot { name: "w", role, weight: tensor(weights, shape), state }
}

/// A step of the optimizer.
fn step_with(optimizer: &Optimizer, slot: &mut Slot, gradient: &Tensor, step: Step, rate: f64) {
    let moments = Moments::at(optimizer, step);
    update(optimizer, slot, gradient, &Update { apply: true, rate, scale: 1.0, moments }).expect("a step");
}

fn rms(x: &[f64]) -> f64 {
    (x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64).sqrt()
}

fn assert_near(slot: &Slot, expected: &[f64], step: Step) {
    let ours: Vec<f32> = Vec::try_from(slot.weight.flatten(0, -1).to_device(Device::Cpu)).expect("floats");
    for (index, (ours, theirs)) in ours.iter().zip(expected).enumerate() {
        // f32 against f64 over a few dozen operations and ten steps.
        assert!(
            (f64::from(*ours) - theirs).abs() < 2e-6,
            "step {step}, number {index}: {ours} against {theirs}"
        );
    }
}

/// Shazeer and Stern, algorithm 4, number by number.
#[test]
fn adafactor_on_a_matrix_equals_the_papers_algorithm() {
    let optimizer = Optimizer::default();
    let mut stream = Stream::new(21, Purpose::Faults, &[]);
    let mut weights = draws(&mut stream, ROWS * COLUMNS);
    let mut ours = slot(&optimizer, &weights, &[ROWS as i64, COLUMNS as i64]);
    let (mut row, mut column) = ([0.0; ROWS], [0.0; COLUMNS]);
    for step in (1..=10).map(Step) {
        let gradient = draws(&mut stream, ROWS * COLUMNS);
        step_with(&optimizer, &mut ours, &tensor(&gradient, &[ROWS as i64, COLUMNS as i64]), step, 0.01);
        let t = step.0 as i32;
        let beta = 0.99 * (1.0 - 0.99f64.powi(t - 1)) / (1.0 - 0.99f64.powi(t));
        for i in 0..ROWS {
            let mean = (0..COLUMNS).map(|j| gradient[i * COLUMNS + j].powi(2)).sum::<f64>() / COLUMNS as f64;
            row[i] = beta * row[i] + (1.0 - beta) * mean;
        }
        for j in 0..COLUMNS {
            let mean = (0..ROWS).map(|i| gradient[i * COLUMNS + j].powi(2)).sum::<f64>() / ROWS as f64;
            column[j] = beta * column[j] + (1.0 - beta) * mean;
        }
        let mean_row = row.iter().sum::<f64>() / ROWS as f64;
        let u: Vec<f64> = (0..ROWS * COLUMNS)
            .map(|n| gradient[n] / (row[n / COLUMNS] * column[n % COLUMNS] / mean_row).sqrt())
            .collect();
        let rate = 0.01 * rms(&weights).max(1e-3) / rms(&u).max(1.0);
        weights.iter_mut().zip(&u).for_each(|(w, u)| *w -= rate * u);
        assert_near(&ours, &weights, step);
    }
}

#[test]
fn adafactor_on_a_vector_keeps_the_whole_second_moment() {
    let optimizer = Optimizer::Adafactor {
        decay: Decay::General,
        beta2: 0.99,
        clip_threshold: 1.0,
        scale_by_parameter: false,
    };
    let mut stream = Stream::new(22, Purpose::Faults, &[]);
    let mut weights = draws(&mut stream, COLUMNS);
    let mut ours = slot(&optimizer, &weights, &[COLUMNS as i64]);
    let mut second = [0.0; COLUMNS];
    for step in (1..=10).map(Step) {
        let gradient = draws(&mut stream, COLUMNS);
        step_with(&optimizer, &mut ours, &tensor(&gradient, &[COLUMNS as i64]), step, 0.01);
        let beta = 1.0 - (step.0 as f64).powf(-0.8);
        second.iter_mut().zip(&gradient).for_each(|(v, g)| *v = beta * *v + (1.0 - beta) * g * g);
        let u: Vec<f64> = gradient.iter().zip(&second).map(|(g, v)| g / v.sqrt()).collect();
        let rate = 0.01 / rms(&u).max(1.0);
        weights.iter_mut().zip(&u).for_each(|(w, u)| *w -= rate * u);
        assert_near(&ours, &weights, step);
    }
}

/// Loshchilov and Hutter, algorithm 2.
#[test]
fn adamw_equals_the_papers_algorithm() {
    let optimizer = Optimizer::Adamw { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
    let mut stream = Stream::new(23, Purpose::Faults, &[]);
    let mut weights = draws(&mut stream, ROWS * COLUMNS);
    let mut ours = slot(&optimizer, &weights, &[ROWS as i64, COLUMNS as i64]);
    let (mut first, mut second) = ([0.0; ROWS * COLUMNS], [0.0; ROWS * COLUMNS]);
    for step in (1..=10).map(Step) {
        let gradient = draws(&mut stream, ROWS * COLUMNS);
        step_with(&optimizer, &mut ours, &tensor(&gradient, &[ROWS as i64, COLUMNS as i64]), step, 0.003);
        for n in 0..ROWS * COLUMNS {
            first[n] = 0.9 * first[n] + 0.1 * gradient[n];
            second[n] = 0.95 * second[n] + 0.05 * gradient[n] * gradient[n];
            let m = first[n] / (1.0 - 0.9f64.powi(step.0 as i32));
            let v = second[n] / (1.0 - 0.95f64.powi(step.0 as i32));
            weights[n] -= 0.003 * (m / (v.sqrt() + 1e-8) + 0.1 * weights[n]);
        }
        assert_near(&ours, &weights, step);
    }
}

/// Position biases move by the whole rate under Adafactor, however small they are, and nothing draws them to
/// 0.
#[test]
fn position_biases_learn_from_zero_and_do_not_decay() {
    let mut stream = Stream::new(24, Purpose::Faults, &[]);
    let zeros = vec![0.0; ROWS * COLUMNS];
    let shape = [ROWS as i64, COLUMNS as i64];
    let optimizer = Optimizer::default();
    let mut ours = slot(&optimizer, &zeros, &shape);
    ours.role = Role::Position;
    let gradient = draws(&mut stream, ROWS * COLUMNS);
    step_with(&optimizer, &mut ours, &tensor(&gradient, &shape), Step(1), 0.01);
    let moved: Vec<f32> = Vec::try_from(ours.weight.flatten(0, -1)).expect("floats");
    let moved: Vec<f64> = moved.into_iter().map(f64::from).collect();
    // The update's size is at most the clip threshold, 1, times the rate.
    assert!(rms(&moved) > 0.005 && rms(&moved) < 0.0101, "{}", rms(&moved));
    let optimizer = Optimizer::Adamw { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.5 };
    let ones = vec![1.0; ROWS * COLUMNS];
    let mut ours = slot(&optimizer, &ones, &shape);
    ours.role = Role::Position;
    step_with(&optimizer, &mut ours, &tensor(&zeros, &shape), Step(1), 0.1);
    assert_near(&ours, &ones, Step(1));
}
