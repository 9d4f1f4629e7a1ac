"""The process that represents a node in its team: `python -m launcher.rendezvous.member FD`.

It adapts torch's elastic rendezvous and store to what `launcher.rendezvous.client` promises, and is the only
part of the launcher that imports torch for itself. FD is one end of a stream socket pair. JSON lines come in:

    {"order": "settings", ...}                         the fields of `RendezvousSettings`; the first line
    {"order": "join", "number": 1, "hello": {...}}     events repeat the number of the join that they belong to
    {"order": "say", "number": 1, "message": {...}}    broadcast a message
    {"order": "leave", "outcome": null}                the exit code of the job, if it has ended

and go out:

    {"event": "news", "number": 1, "text": "..."}      a line for the user: a `MemberNews`
    {"event": "joined", "number": 1, "rank": 0, "hellos": [...]}
    {"event": "heard", "number": 1, "node": 0, "message": {...}}
    {"event": "failed", "number": 1, "kind": "lost", "reason": "..."}      the last line

End of file without "leave" before means that the agent is dead: the other nodes are notified at once. A process
that has failed does not join again; the agent starts another one. A process that serves the store of the
rendezvous stays until no other node uses it.
"""
