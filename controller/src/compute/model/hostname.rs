//! A server's host name, made from its name when none is given.

/// The name lower-cased, with what is not a letter or digit of a host name taken out; at most 63
/// letters; `Server-ID` when nothing is left (as nova does).
pub fn from_name(name: &str, server_id: &str) -> String {
    let mut label = String::new();
    for letter in name.to_ascii_lowercase().chars() {
        match letter {
            ' ' | '_' | '.' => label.push('-'),
            letter if letter.is_ascii_alphanumeric() || letter == '-' => label.push(letter),
            _ => {}
        }
    }
    let label: String = label.trim_matches('-').chars().take(63).collect();
    let label = label.trim_matches('-');
    if label.is_empty() {
        format!("server-{server_id}")
    } else {
        label.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_becomes_a_label() {
        assert_eq!(from_name("My Server_1.example", "x"), "my-server-1-example");
        assert_eq!(from_name("--a--", "x"), "a");
        assert_eq!(from_name("サーバ", "7"), "server-7");
        assert_eq!(from_name(&"a".repeat(99), "x").len(), 63);
    }
}
