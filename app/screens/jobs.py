"""Long work: a form for each verb, the line that equals it, the queue, and how far each is."""

from __future__ import annotations

import shlex

import streamlit as st

from app import look, url
from app.job_forms import VERBS, form
from app.jobs import ENDED, Job, Jobs, listed
from app.screens import page_link
from workbench.errors import UnknownOption

MARKS = {
    "waiting": ":gray[●]",
    "running": ":blue[●]",
    "ending": ":blue[○]",
    "done": ":green[●]",
    "failed": ":red[●]",
    "cancelled": ":gray[○]",
    "stopped": ":orange[●]",
}


@st.cache_resource(show_spinner=False)
def the_jobs() -> Jobs:
    """One queue for all tabs."""
    return Jobs()


def draw() -> None:
    """The form of one verb, and below it the jobs that run, wait and have ended."""
    jobs = the_jobs()
    left, right = st.columns(2)
    with left, st.container(border=True):
        url.choice(st.selectbox, "verb", "What", list(VERBS), format_func=lambda verb: f"{verb} · {VERBS[verb]}")
        try:
            words = form(url.get("verb"), url.get("model"))
        except UnknownOption as error:
            st.error(str(error))
            words = None
        if words is not None:
            job = jobs.add(words)
            url.put(job=job.id)
            st.rerun()
    with right:
        st.fragment(_queue, run_every=1.0 if any(one.state not in ENDED for one in listed()) else None)()


def _queue() -> None:
    known = listed()
    if not known:
        look.empty("No job yet. Fill in the form and run it: its command line is shown here, with its log.")
        return
    for job in known[:30]:
        _job(job, open_=job.id == url.get("job") or job.state == "running")
    if all(one.state in ENDED for one in known) and st.session_state.pop("jobs-ran", False):
        st.rerun()  # the whole page: looking every second is over
    if any(one.state not in ENDED for one in known):
        st.session_state["jobs-ran"] = True


def _job(job: Job, *, open_: bool) -> None:
    with st.container(border=True, key=f"job-{job.id}"):
        st.markdown(f"{MARKS[job.state]} **{job.words[0]}** · {job.state} · {job.made[:16].replace('T', ' ')} UTC")
        st.code(job.line, language="bash", wrap_lines=True)
        if job.state == "running":
            found = job.progress()
            st.progress(found[1] if found else 0.0, text=(found[0] or job.words[0]) if found else "Starting …")
        with st.container(horizontal=True):
            if job.state not in ENDED:
                st.button("Cancel", key=f"cancel-{job.id}", icon=":material/block:", on_click=_cancel, args=(job.id,))
            elif job.state != "done":
                st.button("Go on", key=f"again-{job.id}", icon=":material/replay:", on_click=_again, args=(job.words,),
                          help="The same command: it goes on where it was.")  # fmt: skip
            else:
                name = next((one.partition("=")[2] for one in job.words if one.startswith("--out=")), None)
                if name:
                    page_link("home", f"See {name.rpartition('/')[2]}", key=job.id, run=name.rpartition("/")[2])
        if open_ or job.state in ("failed", "stopped"):
            log, out = job.log().strip(), job.out().strip()
            if log:
                st.code(log[-3000:], language=None)
            if out:
                with st.expander("What it printed", expanded=job.state == "done"):
                    st.code(out, language=None)


def _cancel(job_id: str) -> None:
    if not the_jobs().cancel(job_id):
        st.toast("It has ended already, or another tab has cancelled it.")


def _again(words: list[str]) -> None:
    url.put(job=the_jobs().add(list(words)).id)
    st.toast(f"In the queue: {shlex.join(['workbench', *words])}")
