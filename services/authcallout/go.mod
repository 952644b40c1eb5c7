module unibus.internal/services/authcallout

go 1.26

require unibus.internal/bus v0.0.0

replace unibus.internal/bus => ../../bus
