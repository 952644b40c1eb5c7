module unibus.internal/cli/unibusctl

go 1.26

require unibus.internal/bus v0.0.0

replace unibus.internal/bus => ../../bus
