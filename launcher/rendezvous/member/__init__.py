"""The process that speaks for a node in its team: `python -m launcher.rendezvous.member FD`.

It adapts torch's elastic rendezvous and store to what `launcher.rendezvous.client` promises, and is the only part
of the launcher that imports torch for itself. FD is one end of a stream socket pair. JSON lines come in:

    {"order": "settings", ...}                                  a `Rendezvous`; the first line
    {"order": "join", "number": 1, "hello": {...}}              the number is repeated in what is told of it
    {"order": "say", "number": 1, "message": {...}}
    {"order": "leave", "outcome": null}                       the exit code of the job, if it has ended

and go out:

    {"event": "news", "number": 1, "text": "..."}              a line for the user: a `MemberNews`
    {"event": "joined", "number": 1, "rank": 0, "hellos": [...]}
    {"event": "heard", "number": 1, "node": 0, "message": {...}}
    {"event": "failed", "number": 1, "kind": "lost", "reason": "..."}      the last line

End of file without "leave" before means that the agent is dead: the other nodes are told at once. A process
that has failed joins no more; the agent starts another one. One that serves the store of the rendezvous
stays until the others do not need it any more.
"""
