package main

import (
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/urfave/cli/v2"
)

func (a *app) envCommand() *cli.Command {
	return &cli.Command{
		Name:  "env",
		Usage: "show each setting and where its value comes from",
		Description: "A flag wins over the environment, the environment over the default.\n" +
			"Secrets are shown as the files that hold them, never as values.\n\n" +
			"Example:\n  unibusctl env --json",
		Action: func(*cli.Context) error {
			return a.print(map[string]any{"settings": a.set.origins}, func(t table.Writer) {
				t.AppendHeader(table.Row{"setting", "value", "from"})
				for _, o := range a.set.origins {
					t.AppendRow(table.Row{o.Name, o.Value, o.From})
				}
			})
		},
	}
}
