package test

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"
)

// table prints a benchmark run as Markdown, each row when it is known.
type table struct{ io.Writer }

func (t table) row(measure, aim, format string, values ...any) {
	fmt.Fprintf(t, "| %-58s | %-26s | %-18s |\n", measure, fmt.Sprintf(format, values...), aim)
}

// head says under which conditions the figures hold.
func (b *bench) head() {
	fmt.Fprintf(b, "\n%s, %d CPUs (%s), %s. %d rounds of %d users in %d rooms each, %d at a time.\n\n",
		time.Now().UTC().Format(time.DateOnly), runtime.NumCPU(), cpuModel(), runtime.Version(), b.rounds, b.scale.users, roomsPerUser, benchConcurrency)
	b.row("measure", "aim", "result")
	b.row("---", "---", "---")
}

func cpuModel() string {
	info, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(info)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

// medianBy is the median of one figure over the rounds, spread that and its range.
func medianBy(storms []storm, of func(storm) float64) float64 { return median(figures(storms, of)) }

func spread(storms []storm, of func(storm) float64, format string) string {
	all := figures(storms, of)
	return fmt.Sprintf(format+" ("+format+" to "+format+")", median(all), slices.Min(all), slices.Max(all))
}

func figures(storms []storm, of func(storm) float64) []float64 {
	all := make([]float64, len(storms))
	for i, s := range storms {
		all[i] = of(s)
	}
	return all
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}

// quantile is the smallest value that a share q of the values does not exceed.
func quantile(values []time.Duration, q float64) time.Duration {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000) }
