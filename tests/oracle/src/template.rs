//! Which path template a path belongs to.

/// How well `path` matches `template`: the number of parts that are literally the same; `None` when
/// it does not. A part `{…}` of the template matches any one part; a part `{…}` of the path (when a
/// template is looked up) matches a part `{…}` only.
pub fn rank(template: &str, path: &str) -> Option<usize> {
    let (mut wanted, mut given) = (template.split('/'), path.split('/'));
    let mut literal = 0;
    loop {
        match (wanted.next(), given.next()) {
            (None, None) => return Some(literal),
            (Some(wanted), Some(given)) if placeholder(wanted) => {
                if given.is_empty() {
                    return None;
                }
            }
            (Some(wanted), Some(given)) if wanted == given => literal += 1,
            _ => return None,
        }
    }
}

fn placeholder(part: &str) -> bool {
    part.starts_with('{') && part.ends_with('}')
}

/// Of all templates, the one that matches best.
pub fn best<'a, T>(
    candidates: impl IntoIterator<Item = &'a T>,
    template: impl Fn(&T) -> &str,
    path: &str,
) -> Option<&'a T> {
    candidates
        .into_iter()
        .filter_map(|candidate| Some((rank(template(candidate), path)?, candidate)))
        .max_by_key(|(rank, _)| *rank)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_literal_part_wins_over_a_placeholder() {
        let templates = ["/v2.1/servers/{id}", "/v2.1/servers/detail"];
        let found = |path| best(&templates, |template| template, path).copied();
        assert_eq!(found("/v2.1/servers/detail"), Some("/v2.1/servers/detail"));
        assert_eq!(found("/v2.1/servers/7"), Some("/v2.1/servers/{id}"));
        assert_eq!(
            found("/v2.1/servers/{server_id}"),
            Some("/v2.1/servers/{id}")
        );
        assert_eq!(found("/v2.1/servers/"), None);
        assert_eq!(found("/v2.1/servers"), None);
    }
}
