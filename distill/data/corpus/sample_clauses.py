"""Random clauses: a verb with a fitting subject, objects, tense, negation and adverbials."""

from dataclasses import replace

from neural_layers.distill.data.corpus.nouns import NAMES, NOUNS, nouns_of
from neural_layers.distill.data.corpus.phrases import NP, Clause, Place
from neural_layers.distill.data.corpus.sample_phrases import PhraseSampler
from neural_layers.distill.data.corpus.small_words import FREQUENCIES, MANNERS, MODALS, TIMES
from neural_layers.distill.data.corpus.verbs import BE, VERBS
from neural_layers.distill.data.corpus.words import Verb

_TENSES = (("present", 34.0), ("past", 24.0), ("perfect", 15.0), ("future", 8.0), ("modal", 19.0))
# What can be said to be old, new, …
_DESCRIBED = ("person", "animal", "thing", "place", "clothes", "food", "told", "body", "medicine", "event")
_STATES = ("belong to", "have", "know", "live")
_FOR_SOMEBODY = ("buy", "cook", "open", "repair", "paint", "clean", "look for", "sing", "wash", "write")
_MEDICAL = ("examine", "treat", "prescribe", "take", "have", "suffer from", "hurt")
# Medical verbs are drawn three times as often as the others.
_DRAWN = VERBS + 2 * tuple(verb for verb in VERBS if verb.english in _MEDICAL)


class ClauseSampler(PhraseSampler):
    """Random clauses without relative or infinitive clauses in them."""

    def clause(
        self,
        verb: Verb | None = None,
        *,
        subject: NP | None = None,
        tense: str = "",
        negated: bool | None = None,
        busy: float = 1.0,
    ) -> Clause:
        """A random clause; the arguments fix parts of it, `busy` scales how many adverbials it has."""
        if negated is None:
            negated = self.chance(0.15)
        if verb is None:
            verb = BE if self.chance(0.13) else self.choice(_DRAWN)
        if subject is None:
            kinds = _DESCRIBED if verb is BE else verb.subjects
            subject = self.subject(kinds, negated, simple=verb.english == "belong to")
        clause = self._in_tense(Clause(subject, verb, negated=negated), tense or self.weighted(_TENSES))
        return self._with_adverbials(self._with_objects(clause), busy)

    def _in_tense(self, clause: Clause, tense: str) -> Clause:
        """The clause in this tense, or in another one where the verb or the subject has no such form."""
        verb, subject = clause.verb, clause.subject
        if tense in ("perfect", "future", "modal") and verb.english in _STATES:
            tense = "present"
        if tense == "modal" and "person" not in verb.subjects:
            tense = "future"
        if tense == "modal":
            modal = self.choice(tuple(MODALS))
            past = bool(MODALS[modal].past) and subject.noun != "you" and self.chance(0.3)
            return replace(clause, modal=modal, tense="past" if past else "present")
        if tense == "past" and subject.noun == "you":
            tense = "present"
        if tense == "past" and verb is not BE and not verb.past:
            tense = "perfect"
        return replace(clause, tense=tense)

    def _with_objects(self, clause: Clause) -> Clause:
        verb, subject, frame = clause.verb, clause.subject, clause.verb.frame
        if verb is BE:
            return self._with_predicate(clause)
        if frame == "go":
            return replace(clause, place=self.goal(verb.english, subject))
        if frame == "live":
            return replace(clause, place=self.home())
        if not verb.objects:
            return clause
        if frame == "dat" or " " in frame:
            person = verb.objects == ("person",)
            thing = self.recipient(subject) if person else self.definite(verb.objects, subject)
            return replace(clause, object=thing)
        if frame in ("give", "to"):
            recipient = self.recipient(subject)
            return replace(clause, object=self.object(verb.objects, clause.negated, recipient), recipient=recipient)
        clause = replace(clause, object=self.object(verb.objects, clause.negated, subject))
        if frame == "lay":
            return replace(clause, place=Place("onto", self.definite(("surface",), clause.object or subject)))
        return clause

    def _with_predicate(self, clause: Clause) -> Clause:
        subject = clause.subject
        family = subject.noun in NOUNS and "family" in NOUNS[subject.noun].classes
        if (subject.noun in ("he", "she", *NAMES) or family) and self.chance(0.4):
            job = self.choice(nouns_of(("job",))).english
            adjective = self.choice(("", "", "good", "young", "friendly", "bad"))
            plural = subject.plural
            return replace(clause, predicate=NP(job, "" if plural else "a", adjective, plural))
        clause = replace(clause, predicate=self.adjective_for(subject))
        if subject.is_pronoun or clause.modal or not self.chance(0.35):
            return clause
        kind = NOUNS[subject.noun].classes[:1] if subject.noun in NOUNS else ("person",)
        standard = replace(self.definite(kind, subject), adjective="")
        return replace(clause, standard=standard, equal=self.chance(0.3))

    def _with_adverbials(self, clause: Clause, busy: float) -> Clause:
        verb, frame = clause.verb, clause.verb.frame
        if clause.place is None and clause.verb is not BE:
            if frame == "none" and verb.english != "depart" and self.chance(0.45 * busy):
                clause = replace(clause, place=self.adjunct(clause.subject))
            elif verb.english in _FOR_SOMEBODY and self.chance(0.3 * busy):
                clause = replace(clause, place=Place("for", self.recipient(clause.subject)))
        # "alone with him" and "quickly without him" are left out: their German order is a matter of taste.
        by_itself = frame == "none" and clause.place is None and verb.english not in ("be", "depart", "hurt")
        if (by_itself or frame in ("go", "live")) and self.chance(0.2 * busy):
            manners = [manner.english for manner in MANNERS.values() if frame in manner.uses]
            clause = replace(clause, manner=self.choice(manners))
        return self._with_time(clause, busy)

    def _with_time(self, clause: Clause, busy: float) -> Clause:
        """The clause with an adverbial of time or of frequency that its tense allows, or with none."""
        tense = "modal" if clause.modal and clause.tense == "present" else clause.tense
        busy = 0.0 if clause.verb.english == "belong to" else busy
        if self.chance(0.35 * busy):
            times = [time.english for time in TIMES.values() if tense in time.uses]
            return replace(clause, time=self.choice(times) if times else "")
        if not clause.negated and not clause.modal and self.chance(0.22 * busy):
            often = [adverb.english for adverb in FREQUENCIES.values() if tense in adverb.uses]
            return replace(clause, frequency=self.choice(often) if often else "")
        return clause
