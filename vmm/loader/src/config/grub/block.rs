//! GRUB's environment block, `grubenv`: lines in a file of fixed size, filled up with `#`.

const HEAD: &str = "# GRUB Environment Block";
/// What is set for a single boot, and could not be taken back.
const ONE_SHOT: [&str; 3] = ["next_entry", "prev_saved_entry", "prev_entry"];

/// Names and values, without those for one boot.
pub fn parse(text: &str) -> Option<Vec<(String, String)>> {
    let rest = text.strip_prefix(HEAD)?;
    let mut pairs = Vec::new();
    let mut name = String::new();
    let mut value: Option<String> = None;
    let mut characters = rest.chars();
    while let Some(c) = characters.next() {
        match (c, value.as_mut()) {
            ('\n', _) => {
                if let Some(value) = value.take()
                    && !ONE_SHOT.contains(&name.as_str())
                {
                    pairs.push((std::mem::take(&mut name), value));
                }
                name.clear();
            }
            // The rest is filling.
            ('#', None) if name.is_empty() => {
                characters.by_ref().find(|c| *c == '\n');
            }
            ('=', None) => value = Some(String::new()),
            ('\\', Some(value)) => value.extend(characters.next()),
            (c, Some(value)) => value.push(c),
            (c, None) => name.push(c),
        }
    }
    Some(pairs)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn values_may_hold_anything_but_one_shots_are_left_out() {
        let text = "# GRUB Environment Block\nsaved_entry=a=b\nkernelopts=x \\\\ y\\\nz\n# WARNING\n\
                    next_entry=1\nboot_success=0\n####";
        let pairs = parse(text).unwrap();
        let names: Vec<_> = pairs
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        assert_eq!(
            names,
            [
                ("saved_entry", "a=b"),
                ("kernelopts", "x \\ y\nz"),
                ("boot_success", "0")
            ]
        );
        assert!(parse("saved_entry=1\n").is_none());
    }
}
