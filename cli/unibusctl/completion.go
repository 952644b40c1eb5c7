package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// completionFlag is what the shell scripts append to ask for candidates:
//
//	unibusctl WORD... PARTIAL --generate-bash-completion
//
// The answer is one "candidate<TAB>description" per line, and nothing where a
// file name belongs, so that the shell completes files itself. It is answered
// here, before urfave/cli sees it: v2.27.7 panics on a partial flag of a
// subcommand (its issue 1822).
const completionFlag = "--generate-bash-completion"

// completionRequest returns the words of a request, the partial one last.
func completionRequest(argv []string) ([]string, bool) {
	last := len(argv) - 1
	if last < 0 || argv[last] != completionFlag {
		return nil, false
	}
	words := argv[:last]
	if len(words) == 0 {
		words = []string{""}
	}
	return words, true
}

// complete prints the candidates for the last word.
func (a *app) complete(root *cli.Command, words []string) error {
	done, partial := words[:len(words)-1], words[len(words)-1]
	if slices.Contains(done, "--") || wantsValue(root, done) {
		return nil
	}
	line, _ := parseLine(root, done) // unfinished by nature
	for _, c := range line.candidates(partial) {
		if strings.HasPrefix(c.word, partial) {
			if _, err := fmt.Fprintf(a.out, "%s\t%s\n", c.word, c.about); err != nil {
				return err
			}
		}
	}
	return nil
}

// wantsValue reports whether the last finished word is a flag whose value
// comes next: any word may, so none is proposed.
func wantsValue(root *cli.Command, done []string) bool {
	if len(done) == 0 || !isFlag(done[len(done)-1]) {
		return false
	}
	line, _ := parseLine(root, done[:len(done)-1])
	_, flag := line.find(done[len(done)-1])
	return flag != nil && takesValue(flag)
}

type candidate struct{ word, about string }

func (l *commandLine) candidates(partial string) []candidate {
	var out []candidate
	if strings.HasPrefix(partial, "-") {
		for _, c := range l.path {
			for _, f := range c.Flags {
				about := ""
				if d, ok := f.(cli.DocGenerationFlag); ok {
					about = strings.ReplaceAll(d.GetUsage(), "`", "")
				}
				out = append(out, candidate{"--" + f.Names()[0], about})
			}
		}
		return append(out, candidate{"--help", "show help"})
	}
	for _, c := range l.leaf().Subcommands {
		if !c.Hidden {
			out = append(out, candidate{c.Name, c.Usage})
		}
	}
	if want := strings.Fields(l.leaf().ArgsUsage); len(l.args) < len(want) && strings.Contains(want[len(l.args)], "|") {
		for choice := range strings.SplitSeq(strings.Trim(want[len(l.args)], "[]"), "|") {
			out = append(out, candidate{choice, ""})
		}
	}
	return out
}

func (a *app) completionCommand() *cli.Command {
	return &cli.Command{
		Name:      "completion",
		Category:  "tools",
		Usage:     "print a completion script for a shell",
		ArgsUsage: "bash|zsh|fish",
		Description: "Example, to install it once:\n\n" +
			"   unibusctl completion bash > /usr/share/bash-completion/completions/unibusctl\n" +
			"   unibusctl completion zsh  > /usr/share/zsh/vendor-completions/_unibusctl\n" +
			"   unibusctl completion fish > /usr/share/fish/vendor_completions.d/unibusctl.fish",
		Action: func(c *cli.Context) error {
			arg, err := positional(c, "SHELL")
			if err != nil {
				return err
			}
			script, ok := map[string]string{"bash": bashCompletion, "zsh": zshCompletion, "fish": fishCompletion}[arg[0]]
			if !ok {
				return usagef("no completion for %s: bash, zsh or fish", quote(arg[0]))
			}
			_, err = io.WriteString(a.out, script)
			return err
		},
	}
}

const bashCompletion = `# bash completion for unibusctl
_unibusctl() {
	local cur=${COMP_WORDS[COMP_CWORD]}
	local line
	COMPREPLY=()
	while IFS= read -r line; do
		COMPREPLY+=("${line%%$'\t'*}")
	done < <("${COMP_WORDS[0]}" "${COMP_WORDS[@]:1:COMP_CWORD-1}" "$cur" --generate-bash-completion 2>/dev/null)
}
complete -o bashdefault -o default -F _unibusctl unibusctl
`

const zshCompletion = `#compdef unibusctl
_unibusctl() {
	local -a candidates
	local line
	while IFS= read -r line; do
		candidates+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}")
	done < <("${words[1]}" "${(@)words[2,CURRENT-1]}" "${words[CURRENT]}" --generate-bash-completion 2>/dev/null)
	if (( ${#candidates} )); then
		_describe 'unibusctl' candidates
	else
		_files
	fi
}
if [[ $funcstack[1] == _unibusctl ]]; then
	_unibusctl "$@"
else
	compdef _unibusctl unibusctl
fi
`

const fishCompletion = `# fish completion for unibusctl
function __unibusctl_candidates
	set -l words (commandline -opc) (commandline -ct)
	$words[1] $words[2..-1] --generate-bash-completion 2>/dev/null
end
complete -c unibusctl -f -a '(__unibusctl_candidates)'
complete -c unibusctl -n 'test -z "$(__unibusctl_candidates)"' -F
`
