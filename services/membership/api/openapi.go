package api

import (
	"encoding/json"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"unibus.internal/bus"
)

// operations is the whole API below /v1, in the order of the documentation.
func operations() []operation {
	return slices.Concat(userOperations(), connectionOperations(), inviteOperations(), roomOperations(), keyOperations(), blobOperations(), auditOperations())
}

// always are the errors that every operation may answer with.
var always = []int{
	http.StatusBadRequest, http.StatusUnauthorized, http.StatusTooManyRequests,
	http.StatusInternalServerError, http.StatusServiceUnavailable,
}

var meaning = map[int]string{
	http.StatusOK:                           "Done, or so already.",
	http.StatusCreated:                      "Made.",
	http.StatusAccepted:                     "Committed, and not proven: somebody may still decide on the state before. Repeating it proves it.",
	http.StatusBadRequest:                   "Can never succeed as written.",
	http.StatusUnauthorized:                 "The caller is not known: the same answer for every path, method and cause.",
	http.StatusForbidden:                    "The caller is known, and may not do this.",
	http.StatusNotFound:                     "Not there, or not for this caller.",
	http.StatusPartialContent:               "A range of it.",
	http.StatusRequestedRangeNotSatisfiable: "The file has no such range; Content-Range says how long it is.",
	http.StatusConflict:                     "The state moved on, or does not allow it.",
	http.StatusTooManyRequests:              "Too many requests from this key or address.",
	http.StatusInternalServerError:          "A fault of the service; no details.",
	http.StatusServiceUnavailable:           "Cannot know now: no quorum, no lease, or too much to do. Nothing was changed, or it is said that something may have been.",
}

// object is written in the order that encoding/json gives maps: sorted.
type object map[string]any

// openAPI makes the document from the very table that the router serves.
func openAPI(version string) []byte {
	c := &schemas{components: map[string]*schema{}}
	problem := c.of(reflect.TypeFor[bus.Problem]())
	responses := object{}
	for status, text := range meaning {
		if status < 400 {
			continue
		}
		headers := object{"X-Request-Id": object{"$ref": "#/components/headers/RequestId"}}
		switch status {
		case http.StatusServiceUnavailable, http.StatusTooManyRequests:
			headers[bus.EffectHeader] = object{"description": "none: nothing was changed, and another node may be asked.", "schema": enum("", bus.EffectNone)}
			headers["Retry-After"] = object{"description": "Seconds.", "schema": object{"type": "integer", "minimum": 1}}
		case http.StatusUnauthorized:
			headers["WWW-Authenticate"] = object{"schema": object{"type": "string"}}
		}
		responses[strconv.Itoa(status)] = object{
			"description": text, "headers": headers,
			"content": object{"application/problem+json": object{"schema": problem, "example": exampleProblem(status)}},
		}
	}
	paths := object{}
	for _, o := range operations() {
		if paths[o.path] == nil {
			paths[o.path] = object{}
		}
		paths[o.path].(object)[strings.ToLower(o.method)] = o.document(c)
	}
	for path, summary := range map[string]string{"/healthz": "Whether this node may serve", "/livez": "Whether the process lives", "/readyz": "The parts of /healthz"} {
		probe := object{"description": "Yes.", "content": object{"application/json": object{"schema": object{"type": "object"}}}}
		get := object{"operationId": path[1:], "tags": []string{"probes"}, "summary": summary, "security": []object{}, "responses": object{"200": probe}}
		if path != "/livez" {
			get["responses"].(object)["503"] = object{"description": "No.", "content": probe["content"]}
		}
		paths[path] = object{"get": get}
	}
	doc := object{
		"openapi": "3.1.0",
		"info": object{
			"title": "unibus membership API", "version": version,
			"description": "Users, invites, rooms, members and the audit of a unibus cluster. Every request is signed (RFC 9421, profile unibus-v1) and good once. Answers may gain fields; ignore what you do not know.",
		},
		"servers":  []object{{"url": "/"}},
		"security": []object{{"signature": []string{}}},
		"tags":     []object{{"name": "users"}, {"name": "connections"}, {"name": "invites"}, {"name": "rooms"}, {"name": "keys"}, {"name": "blobs"}, {"name": "audit"}, {"name": "probes"}},
		"paths":    paths,
		"components": object{
			"schemas": c.components, "responses": responses,
			"headers": object{"RequestId": object{"description": "Names the request in the log and the audit.", "schema": object{"type": "string"}}},
			"securitySchemes": object{"signature": object{
				"type": "apiKey", "in": "header", "name": "Signature",
				"description": "With Signature-Input and Content-Digest: RFC 9421, profile unibus-v1. See docs/protocol.md, section 7.1.",
			}},
		},
	}
	out, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		panic(fmt.Sprintf("api: the documentation cannot be written: %v", err)) // at start only, and in every test
	}
	return append(out, '\n')
}

// binary is a body of bytes.
var binary = object{"type": "string", "format": "binary"}

func (o *operation) document(c *schemas) object {
	doc := object{"operationId": o.id, "tags": []string{o.tag}, "summary": o.summary}
	if o.detail != "" {
		doc["description"] = o.detail
	}
	var params []object
	for _, p := range o.shape.params {
		s := *p.schema
		param := object{"name": p.name, "in": p.in, "schema": &s}
		if s.Description != "" {
			param["description"], s.Description = s.Description, ""
		}
		if p.in == "path" {
			param["required"] = true
		}
		params = append(params, param)
	}
	if params != nil {
		doc["parameters"] = params
	}
	if o.shape.body != nil {
		content := object{"schema": o.shape.body}
		if o.body != nil {
			content["example"] = o.body
		}
		doc["requestBody"] = object{"required": true, "content": object{"application/json": content}}
	}
	if o.streams {
		doc["requestBody"] = object{"required": true, "content": object{octets: object{"schema": binary}}}
	}
	responses := object{}
	headers := object{"X-Request-Id": object{"$ref": "#/components/headers/RequestId"}}
	content := object{"application/json": object{"schema": c.of(o.out), "example": o.answer}}
	switch {
	case o.content != "":
		content = object{o.content: object{"schema": binary}}
		for name, what := range map[string]string{
			"ETag": "The SHA-256 in hex, for If-Match.", "Repr-Digest": "Of the whole file (RFC 9530).",
			"Accept-Ranges": "bytes", "Content-Range": "With 206.",
		} {
			headers[name] = object{"description": what, "schema": object{"type": "string"}}
		}
	case o.tagged:
		headers["ETag"] = object{"description": "The revision, for If-Match.", "schema": object{"type": "string"}}
	}
	for _, status := range o.statuses {
		responses[strconv.Itoa(status)] = object{"description": meaning[status], "headers": headers, "content": content}
	}
	for _, status := range append(slices.Clone(o.errors), always...) {
		responses[strconv.Itoa(status)] = object{"$ref": fmt.Sprintf("#/components/responses/%d", status)}
	}
	doc["responses"] = responses
	return doc
}
