//! A measured figure and how it is shown.

/// What one benchmark found.
pub struct Figure {
    pub name: String,
    pub unit: &'static str,
    /// Median of our rounds.
    pub ours: f64,
    /// The peer's name and the median of its rounds.
    pub peer: Option<(&'static str, f64)>,
    pub rounds: usize,
    /// What the project promises: at most this, in `unit`.
    pub limit: Option<f64>,
    /// And at most this part of the peer's.
    pub ratio_limit: Option<f64>,
}

impl Figure {
    pub fn ratio(&self) -> Option<f64> {
        self.peer.map(|(_, theirs)| self.ours / theirs)
    }

    pub fn within_limits(&self) -> bool {
        let absolute = self.limit.is_none_or(|limit| self.ours <= limit);
        let relative = self
            .ratio_limit
            .zip(self.ratio())
            .is_none_or(|(limit, ratio)| ratio <= limit);
        absolute && relative
    }

    pub fn json(&self) -> String {
        serde_json::json!({
            "name": self.name,
            "unit": self.unit,
            "ours": self.ours,
            "peer": self.peer.map(|(name, value)| serde_json::json!({"name": name, "value": value})),
            "ratio": self.ratio(),
            "rounds": self.rounds,
            "limit": self.limit,
            "ratio_limit": self.ratio_limit,
        })
        .to_string()
    }

    pub fn header() -> String {
        format!(
            "{:<28} {:>10} {:>10} {:>7} {:>7}  {:<6} peer",
            "figure", "ours", "peer", "ratio", "rounds", "unit"
        )
    }

    pub fn row(&self) -> String {
        let (peer, value) = match self.peer {
            Some((name, value)) => (name, format!("{value:.2}")),
            None => ("", String::new()),
        };
        let ratio = self
            .ratio()
            .map_or(String::new(), |ratio| format!("{ratio:.3}"));
        let missed = match (self.within_limits(), self.limit, self.ratio_limit) {
            (true, ..) => String::new(),
            (false, limit, ratio) => format!(
                "  MISSED: at most{}{}",
                limit.map_or(String::new(), |limit| format!(" {limit}")),
                ratio.map_or(String::new(), |ratio| format!(", {ratio} of the peer"))
            ),
        };
        format!(
            "{:<28} {:>10.2} {:>10} {:>7} {:>7}  {:<6} {peer}{missed}",
            self.name, self.ours, value, ratio, self.rounds, self.unit
        )
    }
}

/// The middle one (of an even number, the mean of the middle two). `None` of none.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() % 2 {
        _ if values.is_empty() => None,
        0 => Some((values[middle - 1] + values[middle]) / 2.0),
        _ => Some(values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_of_the_sorted_values() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(Vec::new()), None);
    }

    #[test]
    fn a_figure_over_its_part_of_the_peer_is_not_within_limits() {
        let mut figure = Figure {
            name: "x".to_owned(),
            unit: "ms",
            ours: 2.0,
            peer: Some(("other", 10.0)),
            rounds: 1,
            limit: Some(5.0),
            ratio_limit: Some(0.15),
        };
        assert!(!figure.within_limits());
        figure.ratio_limit = Some(0.2);
        assert!(figure.within_limits());
        figure.limit = Some(1.0);
        assert!(!figure.within_limits());
    }
}
