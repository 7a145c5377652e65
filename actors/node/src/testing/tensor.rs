//! Rows of f32, and the count of those that are alive.

use super::device::FakeDevice;
use std::sync::Arc;

/// Counts one tensor as alive until it is dropped.
pub(super) struct Live(FakeDevice);

impl Live {
    pub(super) fn new(device: &FakeDevice) -> Self {
        device.count(1);
        Self(device.clone())
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.0.count(-1);
    }
}

/// Rows of f32, `[rows, hidden]`; slices share the memory.
pub struct FakeTensor {
    data: Arc<Vec<f32>>,
    start: usize,
    rows: usize,
    hidden: usize,
    live: Live,
}

impl FakeTensor {
    pub(super) fn new(data: Vec<f32>, hidden: usize, device: &FakeDevice) -> Self {
        let rows = data.len() / hidden;
        Self { data: Arc::new(data), start: 0, rows, hidden, live: Live::new(device) }
    }

    pub(super) fn row_count(&self) -> usize {
        self.rows
    }

    pub(super) fn row(&self, row: usize) -> &[f32] {
        let from = (self.start + row) * self.hidden;
        &self.data[from..from + self.hidden]
    }

    pub(super) fn each_row(&self) -> impl Iterator<Item = &[f32]> {
        (0..self.rows).map(|row| self.row(row))
    }

    pub(super) fn to_vec(&self) -> Vec<f32> {
        self.data[self.start * self.hidden..(self.start + self.rows) * self.hidden].to_vec()
    }

    pub(super) fn map_rows(&self, of: impl Fn(&[f32]) -> Vec<f32>) -> Vec<f32> {
        self.each_row().flat_map(of).collect()
    }

    pub(super) fn slice(&self, start: usize, rows: usize) -> Self {
        let live = Live::new(&self.live.0);
        Self { data: Arc::clone(&self.data), start: self.start + start, rows, hidden: self.hidden, live }
    }
}

/// A gradient of one shard, `[hidden]`.
pub struct FakeGradient {
    pub(super) values: Vec<f32>,
    #[expect(dead_code, reason = "counts while it is alive")]
    pub(super) live: Live,
}

pub(super) fn add_rows(left: &[f32], right: &[f32]) -> Vec<f32> {
    left.iter().zip(right).map(|(left, right)| left + right).collect()
}
