"""Live video: sources that may be lost, sinks that may stall, and a deadline to keep.

Nothing is imported here, so that `vidpipe.live` costs nothing until a part of it is used:

    capture     cameras, screens, network streams and files at their own pace
    enhance     the models as one stage with tiers, a governor and controls
    outputs     recording, network streams, callbacks
    virtualcam  a camera for other programs
    page        pictures for the browser page
    session     a running filter: graph, figures, controls
    server      the page and the HTTP and WebSocket API
    command     `vidpipe live`
"""
